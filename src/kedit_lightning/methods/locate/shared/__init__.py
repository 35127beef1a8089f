"""What locate-then-edit methods share."""
