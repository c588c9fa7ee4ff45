"""Extraction of tool calls from a request's output deltas."""

from __future__ import annotations

import contextlib
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from ..errors import InputError
from ..outputs import OutputDelta
from ..tool_calling.parser import ToolCall, ToolParser, read_cut_call
from ..tool_calling.tool_choice import ToolUse

CUT_OFF = ("length", "abort")  # finish reasons of incomplete answers


class ToolCallStream:
    """Moves tool calls from a delta's text to its `tool_calls`; a no-op without tools."""

    def __init__(self, tools: ToolUse) -> None:
        self._is_on = bool(tools.shown)
        self._most = None if tools.is_parallel else 1
        self._forced = tools.forced_name
        self._parsers: defaultdict[int, ToolParser] = defaultdict(ToolParser)
        self._counts: defaultdict[int, int] = defaultdict(int)  # calls returned so far, by answer

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Report errors of the grammar compiled from `tools` as errors of `tools`."""
        try:
            yield
        except InputError as error:
            if self._is_on and error.field.startswith("structured.lark"):
                reason = str(error).rpartition("column ")[2].partition(": ")[2]
                text = f"a schema is not supported with tool_choice: {reason or 'too complex'}"
                raise InputError("tools", text) from None
            raise

    def read(self, delta: OutputDelta) -> OutputDelta:
        if not self._is_on:
            return delta
        parser = self._parsers[delta.index]
        text, calls = parser.push(delta.text)
        if delta.finish_reason is not None:
            rest, last = self._end(
                parser, delta.finish_reason, self._counts[delta.index] + len(calls)
            )
            text, calls = text + rest, calls + last
        if self._most is not None:
            calls = calls[: self._most - self._counts[delta.index]]
        self._counts[delta.index] += len(calls)
        named = tuple(replace(call, id=f"call_{uuid.uuid4().hex[:24]}") for call in calls)
        return replace(delta, text=text, tool_calls=named)

    def _end(
        self, parser: ToolParser, reason: str, num_calls: int
    ) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the remaining text and calls of an answer that had `num_calls` calls before.

        With forced calls, a truncated answer keeps its incomplete last call. After a stop string
        the rest stays text, since finish_reason "stop" would present the call as complete.
        """
        rest, calls = parser.flush()
        if self._forced is None or calls or reason not in CUT_OFF or not rest.strip():
            return rest, calls
        call = read_cut_call(rest, "" if num_calls else self._forced)
        return (rest, ()) if call is None else ("", (call,))
