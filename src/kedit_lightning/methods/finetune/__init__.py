"""Fine-tuning editing methods."""
