"""Metrics over cases."""
