"""The two protocols: `octavo.proto` (public) and `worker.proto` (inside a worker group)."""
