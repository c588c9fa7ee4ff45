"""Errors of the client."""

from __future__ import annotations

from ..errors import RETRYABLE


class ClientError(RuntimeError):
    """A call that the server refused or could not finish. `code` is gRPC's, such as
    "INVALID_ARGUMENT" or "UNAVAILABLE"; `retryable`: the same call may be answered later; `field`:
    what is to blame, where one thing is, such as "messages[0].content[2]" or "temperature"."""

    def __init__(
        self, code: str, text: str, retryable: bool | None = None, field: str = ""
    ) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text, self.field = code, text, field
        self.retryable = RETRYABLE.get(code, False) if retryable is None else retryable


def invalid(text: str, field: str = "") -> ClientError:
    """What the server would refuse, refused before it travels."""
    return ClientError("INVALID_ARGUMENT", f"{field}: {text}" if field else text, field=field)
