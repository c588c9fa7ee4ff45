"""The engine: input processing, step loop, worker group, API servers and client."""
