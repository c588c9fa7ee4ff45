"""One operation per file: Triton kernel, launcher, CPU path and a plain-torch reference."""
