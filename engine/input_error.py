"""Errors of one request's input."""

from __future__ import annotations

from ..scheduler.params import shown

__all__ = ["InputError", "TooLong", "shown"]


class InputError(ValueError):
    """What a caller sent cannot be used. The text names the field, the value and the way out."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text if text.startswith(field) else f"{field}: {text}")
        self.field = field


class TooLong(InputError):
    """A prompt leaves no room for output in what the model or the server takes."""
