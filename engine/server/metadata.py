"""What callers say of a call beside its message: HTTP/2 headers, gRPC's metadata."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ...scheduler.params import PRIORITIES, truncated_repr
from ..errors import InputError

log = logging.getLogger("octavo.server")

MAX_REQUEST_ID = 256  # characters
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{12}-0$")
# W3C Trace Context: version, trace id, parent id, flags; later versions may have more behind.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@dataclass(frozen=True)
class CallMetadata:
    """What is absent is None or empty."""

    request_id: str = ""
    priority: int | None = None
    traceparent: str = ""  # a valid one


def read_metadata(pairs: Iterable[tuple[str, str | bytes]]) -> CallMetadata:
    """Raises `InputError` for an x-request-id or x-priority that cannot be."""
    given = {name: value for name, value in pairs if isinstance(value, str)}
    return CallMetadata(
        request_id=checked_request_id(given.get("x-request-id", ""), "x-request-id"),
        priority=_priority(given),
        traceparent=_traceparent(given.get("traceparent", "")),
    )


def request_name(header: str, is_running: Callable[[str], bool], num_prompts: int = 1) -> str:
    """Return a request's unique name by its header x-request-id, which may be a mesh's trace id
    that several requests share: the header's value where no request has that name, else the value
    and a random suffix. To be used before the event loop goes on."""
    random = uuid.uuid4().hex
    if not header:
        return random
    if num_prompts == 1 and not is_running(header):
        return header
    return f"{header}-{random[:12]}"


def header_in(name: str) -> str:
    """Return the header's value in a name that `request_name` made for several prompts; the name
    of the first prompt's request ends in -0."""
    return _RANDOM_SUFFIX.sub("", name)


def log_trace(name: str, beside: CallMetadata) -> None:
    """So that the log's lines of a request are found by its caller's trace."""
    if beside.traceparent:
        log.info("request %r: traceparent %s", name, beside.traceparent)


def checked_request_id(name: str, field: str) -> str:
    if len(name) > MAX_REQUEST_ID:
        raise InputError(field, f"over {MAX_REQUEST_ID} characters")
    return name


def _priority(given: Mapping[str, str]) -> int | None:
    text = given.get("x-priority")
    if text is None:
        return None
    if text not in map(str, PRIORITIES):
        wanted = f"must be from {PRIORITIES[0]} to {PRIORITIES[-1]}"
        raise InputError("x-priority", f"{truncated_repr(text)}: {wanted}")
    return int(text)


def _traceparent(text: str) -> str:
    """The text, if it is one that W3C's Trace Context calls valid; else empty."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None or found[1] == "ff" or not int(found[2], 16) or not int(found[3], 16):
        return ""
    return "" if found[1] == "00" and found[4] else text
