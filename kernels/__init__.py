"""One operation a file: the Triton kernel, its launcher, a CPU path, and a plain-torch oracle."""
