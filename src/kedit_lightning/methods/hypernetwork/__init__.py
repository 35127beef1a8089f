"""Hypernetworks: networks that learn to turn the gradient of a request into an edit."""
