"""Extract tool calls from a request's output deltas."""

from __future__ import annotations

import contextlib
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..outputs import OutputDelta
from ..tool_calling.parser import ToolCall, ToolParser, read_cut_call

CUT_OFF = ("length", "abort")  # finish reasons of answers that are not complete


class ToolCallStream:
    """Takes the calls out of one request's deltas. Without tools, deltas stay as they are."""

    def __init__(self, prompt: Any) -> None:
        """`prompt`: as `AsyncLLM.generate` takes it."""
        has_tools = isinstance(prompt, Mapping) and bool(prompt.get("tools"))
        self._is_on = has_tools and prompt.get("tool_choice") != "none"
        self._most = 1 if has_tools and prompt.get("parallel_tool_calls") is False else None
        self._forced = _forced_name(prompt) if self._is_on else None
        self._parsers: defaultdict[int, ToolParser] = defaultdict(ToolParser)
        self._counts: defaultdict[int, int] = defaultdict(int)  # calls told, by answer

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """What is wrong with the grammar is so with the tools that it was made of."""
        try:
            yield
        except InputError as error:
            if self._is_on and error.field.startswith("structured.lark"):
                reason = str(error).rpartition("column ")[2].partition(": ")[2]
                text = f"a schema that tool_choice cannot keep to: {reason or 'too complex'}"
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
        """Return the rest of an answer, which had `num_calls` before: content and calls.

        An answer of calls alone that was cut off has its last call as far as it goes. (One that a
        stop string ended is text: its finish reason would tell the client that the call is whole.)
        """
        rest, calls = parser.flush()
        if self._forced is None or calls or reason not in CUT_OFF or not rest.strip():
            return rest, calls
        call = read_cut_call(rest, "" if num_calls else self._forced)
        return (rest, ()) if call is None else ("", (call,))


def _forced_name(prompt: Mapping[str, Any]) -> str | None:
    """Return the function that `tool_choice` names, "" where it is "required", else None."""
    choice = prompt.get("tool_choice")
    if isinstance(choice, Mapping):
        function = choice.get("function")
        return str(function.get("name", "")) if isinstance(function, Mapping) else None
    return "" if choice == "required" else None
