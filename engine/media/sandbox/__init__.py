"""Sandboxed decoder processes, without access to files and the network."""
