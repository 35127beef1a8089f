"""Codebooks of keys and values beside one layer (GRACE)."""
