"""Residual memories whose columns are chosen by overlapping masks (MEMOIR)."""
