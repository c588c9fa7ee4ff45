"""Exceptions of the engine and their gRPC status codes."""

from __future__ import annotations

from ..scheduler.admission import AdmissionError, QueueFull

# Status codes used by the protocol, and whether retrying the same request may succeed.
RETRYABLE = {
    "INVALID_ARGUMENT": False,
    "UNAUTHENTICATED": False,
    "PERMISSION_DENIED": False,
    "NOT_FOUND": False,
    "ALREADY_EXISTS": True,  # once the request with this id has finished
    "RESOURCE_EXHAUSTED": True,
    "FAILED_PRECONDITION": False,
    "UNIMPLEMENTED": False,
    "DEADLINE_EXCEEDED": True,
    "UNAVAILABLE": True,
    "INTERNAL": False,
}

WAS_CLOSED = "it was closed"  # the cause reported after `close`


class ConfigError(ValueError):
    """An invalid setting or unsupported checkpoint. The message names it and the fix."""


class InputError(ValueError):
    """Invalid request input. The message names the field, the value and the fix.

    `field`: path of the invalid field, such as "messages[0].content[2]".
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text if text.startswith(field) else f"{field}: {text}")
        self.field = field


class TooLong(InputError):
    """The prompt reaches the model's or the server's length limit, leaving no output tokens."""


class DuplicateRequest(ValueError):
    """The request_id is already in use."""


class GrammarQueueFull(AdmissionError):
    """Too many grammars are compiling or in use. Retrying later may succeed."""


class EngineDead(RuntimeError):
    """The engine has stopped permanently; the message gives the cause. Create a new engine."""


_CODES: tuple[tuple[type[Exception], str], ...] = (  # the first match wins
    (QueueFull, "RESOURCE_EXHAUSTED"),
    (GrammarQueueFull, "RESOURCE_EXHAUSTED"),
    (DuplicateRequest, "ALREADY_EXISTS"),
    (InputError, "INVALID_ARGUMENT"),
    (AdmissionError, "INVALID_ARGUMENT"),
    (EngineDead, "UNAVAILABLE"),
)


def code_of(error: BaseException) -> str:
    """Return the gRPC status code for an exception; INTERNAL if it is none of the above."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), "INTERNAL")


def without_frames(error: BaseException) -> BaseException:
    """Remove the traceback of an expected error, and return the error.

    The traceback's frames refer to the request's input, which would stay in memory until the next
    garbage collection.
    """
    if code_of(error) != "INTERNAL":
        error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def split_code(error: str) -> tuple[str, str]:
    """Split an `OutputDelta.error` into status code and message; the default code is INTERNAL."""
    code, _, text = error.partition(": ")
    return (code, text) if code in RETRYABLE else ("INTERNAL", error)
