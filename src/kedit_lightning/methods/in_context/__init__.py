"""In-context editing methods."""
