"""Edits of how the next token is chosen (DoLa, DeCo)."""
