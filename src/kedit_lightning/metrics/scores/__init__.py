"""The metrics: means over cases, a module a group of scores."""
