"""Data generation, training and export of the embedded demo model."""
