"""What in-context methods share."""
