"""What went wrong, as callers are told it; the codes are `engine/errors.py`'s.

Only texts of our own reach a caller. Whatever else is raised is INTERNAL, and goes to the log.
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

STOPPED = "the engine has stopped; the server's log says why"  # it may name hosts and libraries
CLOSED = "the server is shutting down; ask another, or again later"
OURS = "internal error; the server's log has it"
_FIELD = re.compile(r"([a-z][a-z0-9_]*(?:\[\d+\]|\.[a-z][a-z0-9_]*)*)(?:=|: )")


@dataclass(frozen=True)
class ErrorInfo:
    """A request's end by an error. `field`: whose, where one is to blame; `too_long`: its prompt
    leaves no room for output."""

    code: str
    text: str
    field: str = ""
    too_long: bool = False

    @property
    def retryable(self) -> bool:
        return RETRYABLE[self.code]


class RequestRejected(Exception):
    """What a door refuses by itself. The text names the field, the value and the way out."""

    def __init__(self, code: str, text: str, field: str = "") -> None:
        super().__init__(text)
        self.fault = ErrorInfo(code, text, field)


def error_info(error: Exception) -> ErrorInfo:
    """Of what was raised. INTERNAL is for the log as well: its text says nothing."""
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
    """Of a delta's error, of a request that failed after admission: it may begin with a code."""
    code, text = split_code(error)
    return ErrorInfo(code, text, field_in(text) if code == "INVALID_ARGUMENT" else "")


def field_in(text: str) -> str:
    """The field that an error's text begins with; empty where it begins otherwise."""
    found = _FIELD.match(text)
    return found[1] if found else ""
