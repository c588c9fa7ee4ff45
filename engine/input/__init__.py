"""From messages to token ids, pixels, grids, M-RoPE positions and content hashes."""
