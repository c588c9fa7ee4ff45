"""Small checkpoints, requests and simulated workers for benchmarks and tests."""
