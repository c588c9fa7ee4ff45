"""Fuzzers for grammars, text and connections."""
