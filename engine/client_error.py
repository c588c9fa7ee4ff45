"""Errors of the client."""

from __future__ import annotations


class ClientError(RuntimeError):
    """A call that the server refused or could not finish. `code` is gRPC's, such as
    "INVALID_ARGUMENT" or "UNAVAILABLE"."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


def invalid(text: str) -> ClientError:
    """What the server would refuse, refused before it travels."""
    return ClientError("INVALID_ARGUMENT", text)
