"""Decode image and video files to pixels."""
