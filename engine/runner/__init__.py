"""One rank's step: encode stage, then decode stage, then sample."""
