"""Metrics, tracing, request log, snapshots."""
