"""Step traces."""
