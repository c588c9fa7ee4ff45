"""Server overhead per stream."""
