"""Errors of the HTTP door, in OpenAI's form."""

from __future__ import annotations

import json
import re

from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...scheduler.admission import QueueFull
from ..engine import DuplicateRequest, EngineDead
from ..input_error import InputError

MAX_ERROR_TEXT = 2000  # characters
RETRY_AFTER = "1"  # seconds, of 429 and 503
# A text of SamplingParams begins with its field: "top_p=0: must be ..." or "stop: at most ...".
_FIELD = re.compile(r"([a-z_]{1,40})[=:]")
_OF_CODE = {  # a request that failed after admission: (status, type, code)
    "INVALID_ARGUMENT": (400, "invalid_request_error", None),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", "resource_exhausted"),
    "DEADLINE_EXCEEDED": (504, "timeout_error", "deadline_exceeded"),
    "INTERNAL": (500, "server_error", "internal_error"),
}


class ApiError(Exception):
    """An answer that is an error; its arguments are the fields of OpenAI's error and its status."""

    def __init__(
        self,
        status: int,
        text: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        text = text if len(text) <= MAX_ERROR_TEXT else text[:MAX_ERROR_TEXT] + "…"
        super().__init__(text)
        self.status, self.text, self.kind, self.param, self.code = status, text, kind, param, code

    @property
    def body(self) -> str:
        """JSON in ASCII: what a caller wrote may not be Unicode text."""
        error = {"message": self.text, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        headers = {}
        if self.status in (429, 503):
            headers["retry-after"] = RETRY_AFTER
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body, self.status, headers, "application/json")


def error_of(error: Exception) -> ApiError:
    """What the caller is told. No text of a fault of ours goes out; the caller of this logs it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), "server_error", code="engine_unavailable")
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "rate_limit_error", code="queue_full")
    if isinstance(error, DuplicateRequest):
        return ApiError(409, str(error), param="x-request-id", code="duplicate_request_id")
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, ValueError):  # AdmissionError, sampling values
        found = _FIELD.match(str(error))
        return ApiError(400, str(error), param=found[1] if found else None)
    if isinstance(error, HTTPException):  # the router's own
        if error.status_code == 404:
            return ApiError(404, "there is no such path", "not_found_error")
        return ApiError(error.status_code, "the path does not take this method")
    return ApiError(*_fault("INTERNAL", "internal error; the server's log has it"))


def failure(text: str) -> ApiError:
    """Of a request that failed after admission: its text may begin with a code."""
    code, _, rest = text.partition(": ")
    return (
        ApiError(*_fault(code, rest)) if code in _OF_CODE else ApiError(*_fault("INTERNAL", text))
    )


def _fault(code: str, text: str) -> tuple[int, str, str, None, str | None]:
    status, kind, name = _OF_CODE[code]
    return status, text, kind, None, name
