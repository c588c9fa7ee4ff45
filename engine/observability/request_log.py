"""Log one line per finished request, whatever the reason. Never logs prompts or outputs."""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import InputError, code_of
from ..outputs import OutputDelta
from .stats import EngineStats
from .tracing import RequestSpans

log = logging.getLogger("octavo.request")

MAX_NAME = 256  # characters of a client-supplied name


class RequestRecord:
    """Context manager around a request, which logs its end and writes its spans.

    It also counts requests in `stats` that never reached the step thread.
    """

    def __init__(
        self,
        request_id: str,
        stats: EngineStats,
        spans: RequestSpans | None = None,
        traceparent: str = "",
    ) -> None:
        self.request_id, self._stats = str(request_id), stats  # callers may pass a non-string id
        self._spans, self._traceparent = spans, traceparent
        self.num_prompt_tokens = 0  # set when known
        self.is_admitted = False  # The step thread has the request, and counts its end.
        self._num_output_tokens = 0  # returned to the reader
        self._came_at, self._first_at = time.monotonic(), 0.0
        self._last: OutputDelta | None = None  # final delta

    def add(self, delta: OutputDelta) -> None:
        """Record a delta before it is returned to the reader."""
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
        is_counted = self.is_admitted and (self._last is not None or reason == "abort")
        if not is_counted:
            self._stats.refuse(reason, code)
        if log.isEnabledFor(logging.INFO):
            self._log(reason, code, error)
        if self._spans is not None:
            self._write_spans(self._spans, reason, code)

    def _outcome(self, error: BaseException | None) -> tuple[str, str]:
        """Return the finish reason or "refused", and the status code of the error, if any."""
        if self._last is not None:
            failure = self._last.failure
            return self._last.finish_reason or "", failure.code if failure else ""
        if error is None or isinstance(error, GeneratorExit | asyncio.CancelledError):
            return "abort", ""
        code = code_of(error)
        if code == "INTERNAL" and isinstance(error, ValueError | TypeError):
            code = "INVALID_ARGUMENT"  # invalid options passed to AsyncLLM directly
        return "error" if code in ("INTERNAL", "UNAVAILABLE") else "refused", code

    def refuse(self, error: Exception, code: str) -> None:
        """Log and count a request that was rejected before this context was entered."""
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
        """Return the log fields: from the final delta if there is one, else as seen here."""
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
