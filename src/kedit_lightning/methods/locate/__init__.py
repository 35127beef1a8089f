"""Locate-then-edit editing methods."""
