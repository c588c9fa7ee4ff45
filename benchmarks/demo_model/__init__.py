"""Draws, trains and exports the embedded demo model."""
