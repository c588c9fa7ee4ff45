"""The `octavo` command line."""
