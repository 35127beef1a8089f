"""What hypernetworks share."""
