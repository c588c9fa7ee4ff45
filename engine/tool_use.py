"""A request's use of tools: the form that its choice asks for, and the calls in its deltas."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..scheduler.params import SamplingParams
from ..scheduler.structured import MAX_FORM_BYTES, StructuredOutput
from .input.tools import read_choice, read_tools
from .input_error import InputError
from .output import OutputDelta
from .tool_calls import ToolCall, ToolParser, read_cut_call

CUT_OFF = ("length", "abort")  # finish reasons of answers that are not complete

# How llguidance writes JSON.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# A schema of no other keywords names all of a tool's arguments.
PLAIN = {"type", "properties", "required", "title", "description", "$schema", "$defs"}


class CallReader:
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


def has_tool_grammar(prompt: Any) -> bool:
    """Return whether a prompt's `tool_choice` restricts its answers."""
    is_free = not isinstance(prompt, Mapping) or prompt.get("tool_choice") in (None, "auto", "none")
    return not is_free


def with_tool_choice(prompt: Any, params: SamplingParams | None) -> SamplingParams | None:
    """The sampling that a prompt's `tool_choice` asks for. Raises `InputError`."""
    if not has_tool_grammar(prompt):
        return params
    grammar = tool_grammar(
        prompt.get("tools"), prompt["tool_choice"], prompt.get("parallel_tool_calls") is not False
    )
    return _with_grammar(params or SamplingParams(), grammar)


def _with_grammar(params: SamplingParams, grammar: str) -> SamplingParams:
    """The one place where a choice becomes a form of the answer."""
    if params.structured is not None:
        raise InputError("tool_choice", "asks for a form of the answer, and so do you: give one")
    try:
        return replace(params, structured=StructuredOutput(lark=grammar))
    except ValueError:  # over its size
        text = f"over {MAX_FORM_BYTES} bytes of schemas, which tool_choice makes a grammar of"
        raise InputError("tools", text) from None


def tool_grammar(tools: Any, choice: Any, parallel: bool = True) -> str:
    """Calls of the tools and nothing else, as a Lark grammar of llguidance's. `choice`: "required",
    or one named function, of which one call is made. Raises `InputError`."""
    read_tools(tools)
    kind = read_choice(choice, tools)
    if kind is None:
        tools = [t for t in tools if t["function"]["name"] == choice["function"]["name"]]
    names = [f"call_{index}" for index in range(len(tools))]
    more = r' ("\n" call)*' if kind is not None and parallel else ""
    rules = [f"start: call{more}", f"call: {' | '.join(names)}"]
    rules += [_call_rule(name, tool) for name, tool in zip(names, tools, strict=True)]
    return "\n".join(rules) + "\n"


def _call_rule(name: str, tool: Mapping[str, Any]) -> str:
    """`name` is the rule's. Arguments are an object, whether the schema says so or not, written as
    Qwen does; free white space would be all that a small model writes, and so would be arguments
    that the tool does not name. Without parameters, as OpenAI has it, it takes none."""
    function = tool["function"]
    parameters = function.get("parameters") or {"properties": {}}
    head = f'<tool_call>\n{{"name": "{function["name"]}", "arguments": '
    schema = {**parameters, "x-guidance": WRITTEN}
    if "$ref" not in schema:
        schema.setdefault("type", "object")
    if "properties" in parameters and parameters.keys() <= PLAIN and _names_all(parameters):
        schema["additionalProperties"] = False
    body, tail = json.dumps(schema).replace("&", r"\u0026"), json.dumps("}\n</tool_call>")
    return f"{name}: {json.dumps(head)} %json {body} {tail}"


def _names_all(parameters: Mapping[str, Any]) -> bool:
    """Whether what it requires is among its properties."""
    named, required = parameters["properties"], parameters.get("required") or ()
    lists = isinstance(named, Mapping) and isinstance(required, list | tuple)
    return lists and all(isinstance(name, str) and name in named for name in required)
