"""What methods with a memory share."""
