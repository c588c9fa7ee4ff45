"""Benchmarks, the demo, and the training of the embedded model."""
