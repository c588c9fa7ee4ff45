"""Measurement of steps against the machine's limits."""
