"""Errors as reported to clients.

Clients see only Octavo's own error texts. Any other exception is INTERNAL and goes to the log.
"""

from __future__ import annotations

from ..errors import WAS_CLOSED, EngineDead, RequestError, RequestException

# The cause may name hosts and libraries, so it is only logged.
STOPPED = RequestError("UNAVAILABLE", "the engine has stopped; see the server's log for the cause")
CLOSED = RequestError(
    "UNAVAILABLE", "the server is shutting down; retry later or on another server"
)
OURS = RequestError("INTERNAL", "internal error; see the server's log for details")


class RequestRejected(RequestException):
    """Rejected by the server before admission. Messages name the field, the value and the fix."""

    def __init__(self, code: str, text: str, field: str = "") -> None:
        super().__init__(text)
        self.code, self.field = code, field


def error_info(error: Exception) -> RequestError:
    """Return the error to report for an exception. An INTERNAL one must be logged as well."""
    if isinstance(error, EngineDead):
        return CLOSED if error.cause == WAS_CLOSED else STOPPED
    return error.reason if isinstance(error, RequestException) else OURS
