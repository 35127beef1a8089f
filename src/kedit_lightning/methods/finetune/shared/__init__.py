"""Modules shared by the fine-tuning methods."""
