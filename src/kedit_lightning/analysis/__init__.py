"""What is learned from runs and models."""
