"""Measure steps against the machine's limits."""
