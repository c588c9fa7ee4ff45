"""The engine: input, step loop, worker group, servers and faces."""
