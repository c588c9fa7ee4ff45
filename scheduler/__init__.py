"""What runs in each step: tokens, blocks, images to encode. Standard library alone."""
