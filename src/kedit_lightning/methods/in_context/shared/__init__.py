"""Modules shared by the in-context methods."""
