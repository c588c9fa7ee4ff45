"""Errors of the client."""

from __future__ import annotations

from ..errors import RETRYABLE


class ClientError(RuntimeError):
    """A call that the server rejected or could not finish.

    `code`: the gRPC code, such as "INVALID_ARGUMENT" or "UNAVAILABLE".
    `retryable`: whether the same call may succeed later.
    `field`: the offending field, if any, such as "messages[0].content[2]" or "temperature".
    """

    def __init__(
        self, code: str, text: str, retryable: bool | None = None, field: str = ""
    ) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text, self.field = code, text, field
        self.retryable = RETRYABLE.get(code, False) if retryable is None else retryable


def invalid(text: str, field: str = "") -> ClientError:
    """Return the error of an invalid request that is rejected before it is sent."""
    return ClientError("INVALID_ARGUMENT", f"{field}: {text}" if field else text, field=field)
