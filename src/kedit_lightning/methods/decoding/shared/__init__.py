"""Modules shared by the decoding methods."""
