"""Helpers that do not depend on other parts of the engine."""
