"""Datasets of facts."""
