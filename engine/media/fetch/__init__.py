"""Fetch media from URLs."""
