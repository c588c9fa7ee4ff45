"""Recorded step traces."""
