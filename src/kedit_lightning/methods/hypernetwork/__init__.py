"""Hypernetworks editing methods."""
