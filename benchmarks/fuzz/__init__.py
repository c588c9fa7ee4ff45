"""Fuzzing of grammars, texts and connections."""
