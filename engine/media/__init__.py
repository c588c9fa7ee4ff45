"""Image and video input: sources, limits and options, decoding to pixels."""
