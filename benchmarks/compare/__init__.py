"""Compare the throughput of engines."""
