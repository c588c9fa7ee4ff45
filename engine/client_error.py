"""Errors of the client."""

from __future__ import annotations

# The codes of gRPC that the protocol uses, and whether the same request may be answered later.
RETRYABLE = {
    "INVALID_ARGUMENT": False,
    "UNAUTHENTICATED": False,
    "PERMISSION_DENIED": False,
    "NOT_FOUND": False,
    "ALREADY_EXISTS": True,  # once the request that has the name has ended
    "RESOURCE_EXHAUSTED": True,
    "FAILED_PRECONDITION": False,
    "UNIMPLEMENTED": False,
    "DEADLINE_EXCEEDED": True,
    "UNAVAILABLE": True,
    "INTERNAL": False,
}


def split_code(error: str) -> tuple[str, str]:
    """Code and text of a delta's error, which may begin with a code; else it is INTERNAL."""
    code, _, text = error.partition(": ")
    return (code, text) if code in RETRYABLE else ("INTERNAL", error)


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
