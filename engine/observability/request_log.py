"""A request's end as the log tells it: once for each, whatever ended it. Never its content."""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import InputError, code_of, split_code
from ..outputs import OutputDelta
from .stats import EngineStats
from .tracing import RequestSpans

log = logging.getLogger("octavo.request")

MAX_NAME = 256  # characters of a client's name


class RequestRecord:
    """Entered when a request comes and left when it is over. Those that the step thread never had
    it counts in `stats`."""

    def __init__(
        self,
        request_id: str,
        stats: EngineStats,
        spans: RequestSpans | None = None,
        traceparent: str = "",
    ) -> None:
        self.request_id, self._stats = str(request_id), stats  # a caller's may be no text
        self._spans, self._traceparent = spans, traceparent
        self.num_prompt_tokens = 0  # once that is known
        self.is_admitted = False  # the step thread has it, and counts its end
        self._num_output_tokens = 0  # that its reader was given
        self._came_at, self._first_at = time.monotonic(), 0.0
        self._last: OutputDelta | None = None  # the one that ended it

    def add(self, delta: OutputDelta) -> None:
        """A delta is about to go to the reader."""
        if delta.token_ids:
            self._first_at = self._first_at or time.monotonic()
            self._num_output_tokens += len(delta.token_ids)
        if delta.usage is not None:
            self._last = delta

    def __enter__(self) -> RequestRecord:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        reason, code = self._outcome(error)
        was_told = self._last is not None or reason == "abort"
        if not (self.is_admitted and was_told):
            self._stats.refuse(reason, code)
        if log.isEnabledFor(logging.INFO):
            self._log(reason, code, error)
        if self._spans is not None:
            self._write_spans(self._spans, reason, code)

    def _outcome(self, error: BaseException | None) -> tuple[str, str]:
        """Its finish reason or "refused", and the code of what was wrong."""
        if self._last is not None:
            error_text = self._last.error
            return self._last.finish_reason or "", error_text and split_code(error_text)[0]
        if error is None or isinstance(error, GeneratorExit | asyncio.CancelledError):
            return "abort", ""
        code = code_of(error)
        if code == "INTERNAL" and isinstance(error, ValueError | TypeError):
            code = "INVALID_ARGUMENT"  # an option that a program gave wrong; doors check theirs
        return "error" if code in ("INTERNAL", "UNAVAILABLE") else "refused", code

    def refuse(self, error: Exception, code: str) -> None:
        """It ends before it was entered."""
        reason = "error" if code == "INTERNAL" else "refused"
        self._stats.refuse(reason, code)
        self._log(reason, code, error)

    def _log(self, reason: str, code: str, error: BaseException | None) -> None:
        fields = self._fields(reason)
        if code:
            fields["code"] = code
        if isinstance(error, InputError):
            fields["field"] = error.field[:MAX_NAME]
        log.info(
            "request %s ended: %s, %d prompt tokens, %d output tokens, %.3f s",
            truncated_repr(self.request_id),
            f"{reason} {code} {fields.get('field', '')}".strip(),
            fields["prompt_tokens"],
            fields["output_tokens"],
            fields["total_s"],
            extra=fields,
        )

    def _write_spans(self, spans: RequestSpans, reason: str, code: str) -> None:
        fields = self._fields(reason)
        attributes = {
            "octavo.request_id": fields["request_id"],
            "gen_ai.response.finish_reasons": (reason,),
            "gen_ai.usage.input_tokens": fields["prompt_tokens"],
            "gen_ai.usage.output_tokens": fields["output_tokens"],
        }
        seconds = time.monotonic() - self._came_at
        times = None if self._last is None else self._last.times
        spans.write(self._traceparent, seconds, times, attributes, code)

    def _fields(self, reason: str) -> dict[str, Any]:
        """Of what the engine told on the last delta, else of what was seen here."""
        now = time.monotonic()
        fields: dict[str, Any] = {
            "request_id": self.request_id[:MAX_NAME],
            "finish_reason": reason,
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self._num_output_tokens,
            "total_s": now - self._came_at,
            "ttft_s": self._first_at - self._came_at if self._first_at else None,
        }
        if self._last is not None:
            fields |= vars(self._last.usage)
        if self._last is not None and self._last.times is not None:
            fields |= vars(self._last.times)
        seconds = {name: round(value, 6) for name, value in fields.items() if _is_time(name, value)}
        return fields | seconds


def _is_time(name: str, value: Any) -> bool:
    return name.endswith("_s") and value is not None
