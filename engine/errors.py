"""Exceptions of the engine and their gRPC status codes."""

from __future__ import annotations

from ..scheduler.errors import (
    RETRYABLE,
    AdmissionError,
    InputError,
    PromptTooLong,
    QueueFull,
    RequestError,
    RequestException,
)

__all__ = [
    "RETRYABLE",
    "WAS_CLOSED",
    "AdmissionError",
    "ConfigError",
    "DecoderUnavailable",
    "DuplicateRequest",
    "EngineDead",
    "GrammarQueueFull",
    "InputError",
    "PreprocessTimeout",
    "PromptTooLong",
    "QueueFull",
    "RequestError",
    "RequestException",
    "TooLong",
    "code_of",
    "without_frames",
]

WAS_CLOSED = "it was closed"  # the cause reported after `close`


class ConfigError(ValueError):
    """An invalid setting or unsupported checkpoint. The message names it and the fix."""


class TooLong(InputError):
    """The prompt reaches the model's or the server's length limit, leaving no output tokens."""

    too_long = True


class DuplicateRequest(RequestException, ValueError):
    """The request_id is already in use."""

    code, field = "ALREADY_EXISTS", "request_id"


class GrammarQueueFull(AdmissionError):
    """Too many grammars are compiling or in use. Retrying later may succeed."""

    code = "RESOURCE_EXHAUSTED"


class PreprocessTimeout(RequestException):
    """The request's timeout expired during preprocessing."""

    code = "DEADLINE_EXCEEDED"

    def __str__(self) -> str:
        return "timed out before the input was preprocessed"


class DecoderUnavailable(RequestException):
    """No process for the request's images and videos could be started. Retrying may succeed."""

    code = "UNAVAILABLE"

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: the media decoder did not start; try again later"


class EngineDead(RequestException, RuntimeError):
    """The engine has stopped permanently. Create a new engine."""

    code = "UNAVAILABLE"

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause

    def __str__(self) -> str:
        return f"the engine stopped: {self.cause}"


def code_of(error: BaseException) -> str:
    """Return the gRPC status code for an exception; INTERNAL if it does not say."""
    return error.code if isinstance(error, RequestException) else "INTERNAL"


def without_frames(error: BaseException) -> BaseException:
    """Remove the traceback of an expected error, and return the error.

    The traceback's frames refer to the request's input, which would stay in memory until the next
    garbage collection.
    """
    if isinstance(error, RequestException):
        error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
