"""Measurement of server overhead per stream."""
