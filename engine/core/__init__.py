"""The step loop: requests, batches, outputs."""
