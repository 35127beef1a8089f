"""Facts stated in the prompt, and stores of facts (IKE, ICE, PROMPT, MeLLo)."""
