"""What fine-tuning methods share."""
