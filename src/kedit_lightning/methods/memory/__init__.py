"""Memory editing methods."""
