"""Decoding by the layers of the model itself: DoLa, DeCo."""
