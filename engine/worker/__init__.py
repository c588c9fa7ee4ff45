"""The worker group: one process per rank, controlled over gRPC."""
