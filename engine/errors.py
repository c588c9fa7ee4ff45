"""Errors of the engine, and the gRPC status code of each."""

from __future__ import annotations

from ..scheduler.admission import AdmissionError, QueueFull

# gRPC's codes that the protocol uses, and whether the same request may succeed later.
RETRYABLE = {
    "INVALID_ARGUMENT": False,
    "UNAUTHENTICATED": False,
    "PERMISSION_DENIED": False,
    "NOT_FOUND": False,
    "ALREADY_EXISTS": True,  # after the request of that name has ended
    "RESOURCE_EXHAUSTED": True,
    "FAILED_PRECONDITION": False,
    "UNIMPLEMENTED": False,
    "DEADLINE_EXCEEDED": True,
    "UNAVAILABLE": True,
    "INTERNAL": False,
}

WAS_CLOSED = "it was closed"  # why an engine stopped that the caller closed


class ConfigError(ValueError):
    """A setting or a checkpoint that cannot be served. The text names it and says how to fix it."""


class InputError(ValueError):
    """A request's input is invalid. The text names the field and the value, and says how to fix it.

    `field`: the path of the invalid field, such as "messages[0].content[2]".
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text if text.startswith(field) else f"{field}: {text}")
        self.field = field


class TooLong(InputError):
    """A prompt leaves no room for output within the model's or the server's limit."""


class DuplicateRequest(ValueError):
    """A request_id that is in use."""


class GrammarQueueFull(AdmissionError):
    """Too many grammars are being compiled or are in use; the same request may succeed later."""


class EngineDead(RuntimeError):
    """The workers have ended for good; the text says why. A new engine is needed."""


_CODES: tuple[tuple[type[Exception], str], ...] = (  # the first that matches
    (QueueFull, "RESOURCE_EXHAUSTED"),
    (GrammarQueueFull, "RESOURCE_EXHAUSTED"),
    (DuplicateRequest, "ALREADY_EXISTS"),
    (InputError, "INVALID_ARGUMENT"),
    (AdmissionError, "INVALID_ARGUMENT"),
    (EngineDead, "UNAVAILABLE"),
)


def code_of(error: BaseException) -> str:
    """Return an exception's gRPC code. INTERNAL: an error of the engine itself."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), "INTERNAL")


def without_frames(error: BaseException) -> BaseException:
    """Remove the traceback of an expected error. Its frames refer to the request's input, which
    would stay in memory until the next garbage collection."""
    if code_of(error) != "INTERNAL":
        error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def split_code(error: str) -> tuple[str, str]:
    """Split the error of a delta into code and text. Without a code it is INTERNAL."""
    code, _, text = error.partition(": ")
    return (code, text) if code in RETRYABLE else ("INTERNAL", error)
