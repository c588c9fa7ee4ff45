"""Qwen2-VL: vision tower and decoder, as sharded layers."""
