"""Facts stated in the prompt (IKE)."""
