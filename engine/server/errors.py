"""Errors as reported to clients, with the codes of `engine/errors.py`.

Clients see only Octavo's own error texts. Any other exception is INTERNAL and goes to the log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...scheduler.admission import PromptTooLong
from ..errors import (
    RETRYABLE,
    WAS_CLOSED,
    DuplicateRequest,
    EngineDead,
    InputError,
    TooLong,
    code_of,
    split_code,
)

# The cause may name hosts and libraries, so it is only logged.
STOPPED = "the engine has stopped; see the server's log for the cause"
CLOSED = "the server is shutting down; retry later or on another server"
OURS = "internal error; see the server's log for details"
_FIELD = re.compile(r"([a-z][a-z0-9_]*(?:\[\d+\]|\.[a-z][a-z0-9_]*)*)(?:=|: )")


@dataclass(frozen=True)
class ErrorInfo:
    """The error that ended a request."""

    code: str
    text: str
    field: str = ""  # the offending field, if any
    too_long: bool = False  # the prompt leaves no tokens for output

    @property
    def retryable(self) -> bool:
        return RETRYABLE[self.code]


class RequestRejected(Exception):
    """Rejected by the server before admission. Messages name the field, the value and the fix."""

    def __init__(self, code: str, text: str, field: str = "") -> None:
        super().__init__(text)
        self.fault = ErrorInfo(code, text, field)


def error_info(error: Exception) -> ErrorInfo:
    """Return the error to report for an exception. An INTERNAL one must be logged as well."""
    if isinstance(error, RequestRejected):
        return error.fault
    code, text = code_of(error), str(error)
    if code == "INTERNAL":
        return ErrorInfo(code, OURS)
    if isinstance(error, InputError):
        return ErrorInfo(code, text, error.field, isinstance(error, TooLong))
    if isinstance(error, DuplicateRequest):
        return ErrorInfo(code, text, "request_id")
    if isinstance(error, EngineDead):
        return ErrorInfo(code, CLOSED if text.endswith(WAS_CLOSED) else STOPPED)
    field = field_in(text) if code == "INVALID_ARGUMENT" else ""
    return ErrorInfo(code, text, field, isinstance(error, PromptTooLong))


def parse_error_info(error: str) -> ErrorInfo:
    """Parse the error of a delta, which may start with a code."""
    code, text = split_code(error)
    return ErrorInfo(code, text, field_in(text) if code == "INVALID_ARGUMENT" else "")


def field_in(text: str) -> str:
    """Return the field that an error text starts with, or "" if there is none."""
    found = _FIELD.match(text)
    return found[1] if found else ""
