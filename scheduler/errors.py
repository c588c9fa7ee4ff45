"""Errors of requests, from the place that finds one to the client."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class RequestError:
    """The error that ended a request: a code of `RETRYABLE`, and a message for the client."""

    code: str
    message: str
    field: str = ""  # the offending field, if any
    too_long: bool = False  # the prompt leaves no tokens for output

    @property
    def retryable(self) -> bool:
        return RETRYABLE[self.code]

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class RequestException(Exception):
    """An exception that ends only its request. Its text is meant for the client."""

    code = "INVALID_ARGUMENT"
    field = ""
    too_long = False

    @property
    def reason(self) -> RequestError:
        return RequestError(self.code, str(self), self.field, self.too_long)


class InputError(RequestException, ValueError):
    """Invalid request input. The message names the field, the value and the fix.

    `field`: path of the invalid field, such as "messages[0].content[2]".
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(field, text)
        self.field, self._text = field, text if text.startswith(field) else f"{field}: {text}"

    def __str__(self) -> str:
        return self._text


class AdmissionError(RequestException, ValueError):
    """The request can never run with the configured limits; the text names the limit."""

    def __init__(self, text: str, field: str = "") -> None:
        super().__init__(text)
        self.field = field


class PromptTooLong(AdmissionError):
    """The prompt leaves no capacity for output tokens."""

    too_long = True


class QueueFull(AdmissionError):
    """The waiting queue is full; the same request may succeed later."""

    code = "RESOURCE_EXHAUSTED"
