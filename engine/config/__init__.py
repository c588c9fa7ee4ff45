"""Settings of the engine and of checkpoints."""
