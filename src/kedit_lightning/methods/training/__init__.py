"""What all trained methods share: networks, episodes, checkpoints, distributed sums."""
