"""Tensor functions that several families of methods share."""
