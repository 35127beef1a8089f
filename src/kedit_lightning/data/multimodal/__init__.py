"""Datasets of facts about pictures."""
