"""Compute the routing prefix of a request.

Invalid requests get an empty prefix; the replica reports their errors.
"""

from __future__ import annotations

import functools
from typing import Any

from ...proto import octavo_pb2 as pb
from ..config.media_limits import MediaLimits
from ..errors import InputError
from ..server.errors import RequestRejected
from ..server.grpc_api.messages import read_prompt
from ..server.http_api.errors import ApiError
from ..server.http_api.openai_request import read_chat, read_completions, read_json
from ..utils.readers import AT_ONCE
from ..utils.readers import read as in_thread
from .prefix import Prefix, prefix_of

LIMITS = MediaLimits()
READERS: dict[str, Any] = {
    "/v1/chat/completions": read_chat,
    "/v1/completions": read_completions,
}


async def http_prefix(path: str, body: bytes) -> Prefix:
    if path not in READERS:
        return Prefix()
    return await in_thread(functools.partial(_http_prefix, path, body), len(body) > AT_ONCE)


def _http_prefix(path: str, body: bytes) -> Prefix:
    """Return the prefix of the first prompt."""
    try:
        found = read_json(body)
        asked = READERS[path](found, (found.get("model"),))
        return prefix_of(asked.prompts[0], asked.options.get("cache_salt", ""))
    except (InputError, ApiError, RequestRejected, ValueError, TypeError, RecursionError):
        return Prefix()


def grpc_prefix(request: pb.GenerateRequest) -> Prefix:
    try:
        return prefix_of(read_prompt(request, LIMITS), request.cache_salt)
    except (InputError, RequestRejected, ValueError, TypeError):
        return Prefix()
