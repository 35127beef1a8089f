"""Datasets about what a model should not say."""
