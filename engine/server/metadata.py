"""Call metadata: HTTP headers and gRPC metadata."""

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
# W3C Trace Context: version, trace id, parent id, flags; later versions may append fields.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@dataclass(frozen=True)
class CallMetadata:
    """Metadata of a call; absent values are None or empty."""

    request_id: str = ""
    priority: int | None = None
    traceparent: str = ""  # valid if present


def read_metadata(pairs: Iterable[tuple[str, str | bytes]]) -> CallMetadata:
    """Read a call's metadata. Raises `InputError` for an invalid x-request-id or x-priority."""
    given = {name: value for name, value in pairs if isinstance(value, str)}
    return CallMetadata(
        request_id=checked_request_id(given.get("x-request-id", ""), "x-request-id"),
        priority=_priority(given),
        traceparent=_traceparent(given.get("traceparent", "")),
    )


def request_name(header: str, is_running: Callable[[str], bool], num_prompts: int = 1) -> str:
    """Return a unique request id: the header x-request-id, with a random suffix if it is in use.

    Several requests may share the header, for example a service mesh's trace id. The caller must
    start the request before it yields to the event loop.
    """
    random = uuid.uuid4().hex
    if not header:
        return random
    if num_prompts == 1 and not is_running(header):
        return header
    return f"{header}-{random[:12]}"


def header_in(name: str) -> str:
    """Return the header's value in a name that `request_name` created for several prompts.

    `name` is the request id of the first prompt, which ends in -0.
    """
    return _RANDOM_SUFFIX.sub("", name)


def log_trace(name: str, metadata: CallMetadata) -> None:
    """Log a request's traceparent, so that its log lines can be found by the caller's trace."""
    if metadata.traceparent:
        log.info("request %r: traceparent %s", name, metadata.traceparent)


def checked_request_id(name: str, field: str) -> str:
    """Return `name`. Raises `InputError` if it is too long."""
    if len(name) > MAX_REQUEST_ID:
        raise InputError(field, f"is over {MAX_REQUEST_ID} characters long")
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
    """Return the text if it is a valid W3C Trace Context header, else an empty string."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None or found[1] == "ff" or not int(found[2], 16) or not int(found[3], 16):
        return ""
    return "" if found[1] == "00" and found[4] else text
