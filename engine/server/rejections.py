"""Count and log requests rejected before they reach the engine."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator

from ..observability.request_log import RequestRecord
from ..observability.stats import EngineStats
from .errors import error_info


def _code_of(error: Exception) -> str:
    return error_info(error).code


@contextlib.contextmanager
def counted(
    request_id: str, stats: EngineStats, code_of: Callable[[Exception], str] = _code_of
) -> Iterator[None]:
    """Record an exception raised inside as a rejection. `request_id`: the client's, or ""."""
    try:
        yield
    except Exception as error:
        RequestRecord(request_id or uuid.uuid4().hex, stats).refuse(error, code_of(error))
        raise
