"""Protocols: `octavo.proto` is public; the others connect the engine and its processes."""
