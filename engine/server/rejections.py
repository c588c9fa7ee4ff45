"""What a door refuses by itself, before the engine knows of it: counted and logged all the same."""

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
    """What is raised within is a request's end. `request_id`: as its client has it, if at all."""
    try:
        yield
    except Exception as error:
        RequestRecord(request_id or uuid.uuid4().hex, stats).refuse(error, code_of(error))
        raise
