"""Layers that defer to a trained copy where a gate says so (DEFER)."""
