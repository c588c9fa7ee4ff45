"""The worker group: one process a rank, driven by gRPC."""
