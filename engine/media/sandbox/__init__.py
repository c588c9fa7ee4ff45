"""Decoder processes without access to files and network."""
