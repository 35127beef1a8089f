"""Facts stated in the prompt (IKE, ICE, PROMPT)."""
