"""Plain text for covariances of keys."""
