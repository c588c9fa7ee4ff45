"""Structured output: grammar compilation and token masks."""
