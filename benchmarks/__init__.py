"""Benchmarks, the demo, and training of the embedded model."""
