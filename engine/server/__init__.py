"""API servers: gRPC, OpenAI-compatible HTTP and Prometheus metrics."""
