"""The kinds of edit."""
