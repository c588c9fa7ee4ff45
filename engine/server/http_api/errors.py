"""Errors of the HTTP server, in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.responses import Response

from ....scheduler.params import truncated_repr
from ...errors import RequestError
from ..errors import error_info

MAX_ERROR_TEXT = 2000  # characters
RETRY_AFTER = "1"  # seconds, for 429 and 503
OF_CODE: dict[str, tuple[int, str, str | None]] = {  # HTTP status, OpenAI's type and code
    "INVALID_ARGUMENT": (400, "invalid_request_error", None),
    "UNAUTHENTICATED": (401, "authentication_error", "invalid_api_key"),
    "PERMISSION_DENIED": (403, "permission_error", None),
    "NOT_FOUND": (404, "not_found_error", "model_not_found"),
    "ALREADY_EXISTS": (409, "invalid_request_error", "duplicate_request_id"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", "rate_limit_exceeded"),
    "FAILED_PRECONDITION": (400, "invalid_request_error", None),
    "UNIMPLEMENTED": (501, "invalid_request_error", "unsupported_parameter"),
    "INTERNAL": (500, "server_error", "internal_error"),
    "UNAVAILABLE": (503, "server_error", "unavailable"),
    "DEADLINE_EXCEEDED": (504, "timeout_error", "deadline_exceeded"),
}


class ApiError(Exception):
    """An error response: an HTTP status and the fields of OpenAI's error object."""

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
        """The JSON body, in ASCII: quoted input may contain invalid Unicode."""
        error = {"message": self.text, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error})

    def response(self) -> Response:
        headers = {}
        if self.status in (429, 503):
            headers["retry-after"] = RETRY_AFTER
        if self.status in (500, 501, 504):  # OpenAI's clients retry any 5xx by default
            headers["x-should-retry"] = "false"
        if self.status == 408:  # the rest of the body may still arrive
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body, self.status, headers, "application/json")


def api_error(fault: RequestError) -> ApiError:
    status, kind, code = OF_CODE[fault.code]
    if fault.too_long:
        code = "context_length_exceeded"
    return ApiError(status, fault.message, kind, fault.field or None, code)


def fault_code(error: Exception) -> str:
    """Return the engine's error code, for its log and metrics."""
    return "INVALID_ARGUMENT" if isinstance(error, ApiError) else error_info(error).code


def error_of(error: Exception) -> ApiError:
    """Return the response for an exception. Internal errors are masked; log them separately."""
    if isinstance(error, ApiError):
        return error
    return api_error(error_info(error))


def misrouted(error: HTTPException, method: str, path: str, paths: Sequence[str]) -> ApiError:
    """Return the response for a routing error. `paths`: all existing paths."""
    if error.status_code == 404:
        near = [each for each in paths if each in (f"/v1{path}", path.removeprefix("/v1"))]
        near = [each for each in near if each != "/"]
        some = [each for each in paths if each.startswith("/v1/") and "{" not in each]
        text = f"unknown path; use one of {', '.join(some)}"
        if near:
            text = f"unknown path; use {near[0]}"
            text += (
                "; base_url of OpenAI's clients must end with /v1" if path in near[0][1:] else ""
            )
        return ApiError(404, f"{truncated_repr(path)}: {text}", "not_found_error")
    takes = (error.headers or {}).get("Allow", "")
    return ApiError(
        error.status_code, f"{truncated_repr(path)}: use {takes}, not {truncated_repr(method)}"
    )
