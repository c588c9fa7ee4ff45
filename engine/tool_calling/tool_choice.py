"""Grammars that enforce a request's `tool_choice`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...scheduler.params import SamplingParams, truncated_repr
from ...scheduler.structured import MAX_FORM_BYTES, StructuredOutput
from ..errors import InputError
from .schema import read_choice, read_tools

# JSON format for llguidance, as Qwen writes it.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# A schema with only these keywords lists all of a tool's arguments.
PLAIN = {"type", "properties", "required", "title", "description", "$schema", "$defs"}


@dataclass(frozen=True, eq=False)
class ToolUse:
    """The tools of a request, and which of them its answers may or must call."""

    tools: Sequence[Mapping[str, Any]] = ()
    choice: Any = None  # OpenAI's tool_choice
    is_parallel: bool = True  # False: at most one call
    written: tuple[str, ...] = ()  # the tools as JSON

    @classmethod
    def of(cls, prompt: Mapping[str, Any]) -> ToolUse:
        """Read and validate `TOOL_FIELDS` of a prompt. Raises `InputError`."""
        parallel, tools = prompt.get("parallel_tool_calls"), prompt.get("tools")
        if parallel is not None and not isinstance(parallel, bool):
            raise InputError(
                "parallel_tool_calls", f"{truncated_repr(parallel)}: must be true or false"
            )
        written, choice = tuple(read_tools(tools)), prompt.get("tool_choice")
        read_choice(choice, tools)
        return cls(tools or (), choice, parallel is not False, written)

    @property
    def shown(self) -> tuple[str, ...]:
        """The tools to include in the prompt, as JSON."""
        return () if self.choice == "none" else self.written

    @property
    def forced_name(self) -> str | None:
        """The name of the function to call; "": any of them; None: no call is required."""
        if self.choice in (None, "auto", "none"):
            return None
        return "" if self.choice == "required" else str(self.choice["function"]["name"])

    def with_grammar(self, params: SamplingParams | None) -> SamplingParams | None:
        """Add the grammar of `choice` to `params`, if it restricts the answers.

        Takes long for large schemas. Raises `InputError`.
        """
        if self.forced_name is None:
            return params
        params = params or SamplingParams()
        if params.structured is not None:
            raise InputError("tool_choice", "cannot be combined with structured output; remove one")
        try:
            return replace(params, structured=StructuredOutput(lark=self.grammar()))
        except InputError:  # the grammar is too large
            text = f"the schemas exceed {MAX_FORM_BYTES} bytes, the maximum with tool_choice"
            raise InputError("tools", text) from None

    def grammar(self) -> str:
        """Return a Lark grammar for llguidance that allows only tool calls.

        A named function is called exactly once.
        """
        name = self.forced_name
        tools = [tool for tool in self.tools if name in ("", tool["function"]["name"])]
        rules = [f"call_{index}" for index in range(len(tools))]
        more = r' ("\n" call)*' if not name and self.is_parallel else ""
        lines = [f"start: call{more}", f"call: {' | '.join(rules)}"]
        lines += [_call_rule(rule, tool) for rule, tool in zip(rules, tools, strict=True)]
        return "\n".join(lines) + "\n"


def _call_rule(name: str, tool: Mapping[str, Any]) -> str:
    """Return the grammar rule `name` for calls of one tool.

    Arguments are an object even if the schema does not say so, in Qwen's JSON format. Free white
    space and undeclared arguments are excluded, since a small model may write them endlessly. As
    in OpenAI's API, a tool without parameters has no arguments.
    """
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
    """Return whether all required arguments are among the schema's properties."""
    named, required = parameters["properties"], parameters.get("required") or ()
    lists = isinstance(named, Mapping) and isinstance(required, list | tuple)
    return lists and all(isinstance(name, str) and name in named for name in required)
