"""The grammar that a tool choice asks for, as llguidance reads it."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.errors import InputError
from octavo.engine.tool_calling.parser import ToolCall, split_answer
from octavo.engine.tool_calling.tool_choice import ToolUse

SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "a.b-c", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now"}},
]
ONE = {"type": "function", "function": {"name": "weather"}}


def call(name: str, arguments: Any) -> str:
    """As llguidance writes it: it escapes nothing but what JSON has to."""
    written = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {written}}}\n</tool_call>'


def is_taken(text: str, choice: Any, parallel: bool = True, tools: Any = TOOLS) -> bool:
    """Whether the grammar has the whole text as an answer."""
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_lark(ToolUse(tools, choice, parallel).grammar())
    assert not llguidance.LLMatcher.validate_grammar(grammar, tokenizer)
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    tokens = tokenizer.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and (
        matcher.consume_tokens(tokens) and matcher.is_accepting()
    )


WARM = call("weather", {"place": "Oslo", "days": 3})
OTHER = call("a.b-c", {"x": [{"</tool_call>": "é"}]})


@pytest.mark.parametrize(
    ("text", "choice", "parallel", "taken"),
    [
        (WARM, "required", True, True),
        (OTHER, "required", True, True),
        (f"{WARM}\n{OTHER}\n{WARM}", "required", True, True),
        (f"{WARM}\n{OTHER}", "required", False, False),
        (WARM, "required", False, True),
        (WARM, ONE, True, True),
        (OTHER, ONE, True, False),
        (f"{WARM}\n{WARM}", ONE, True, False),
        (f"Let me see.\n{WARM}", "required", True, False),
        (call("weather", {"days": 3}), "required", True, False),
        (call("weather", {"place": 3}), "required", True, False),
        (call("news", {}), "required", True, False),
        (call("a.b-c", []), "required", True, False),
        (call("now", {}), "required", True, True),
        (call("now", {"x": 1}), "required", True, False),
        ("", "required", True, False),
    ],
)
def test_calls_and_nothing_else(text: str, choice: Any, parallel: bool, taken: bool) -> None:
    assert is_taken(text, choice, parallel) == taken


@pytest.mark.parametrize(
    ("schema", "has_others"),
    [
        ({"properties": {"x": {}}}, False),
        ({"properties": {"x": {}}, "additionalProperties": True}, True),
        ({"properties": {"x": {}}, "allOf": [{"properties": {"y": {}}}]}, True),
        ({"properties": {"x": {}}, "required": ["y"]}, True),
        ({"type": "object"}, True),
    ],
)
def test_arguments_are_an_object_of_what_is_named(schema: dict[str, Any], has_others: bool) -> None:
    """JSON's schemas let others pass unless they say so; a small model would write nothing else."""
    tools = [{"type": "function", "function": {"name": "a", "parameters": schema}}]
    assert is_taken(call("a", {"x": 1}), "required", tools=tools) == ("required" not in schema)
    assert is_taken(call("a", {"x": 1, "y": 1}), "required", tools=tools) == has_others
    assert not is_taken(call("a", 5), "required", tools=tools)


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20), st.integers(-99, 99))
def test_what_the_grammar_has_the_parser_finds(place: str, days: int) -> None:
    arguments = {"place": place, "days": days}
    text = call("weather", arguments)
    assert is_taken(text, ONE)
    content, (found,) = split_answer(text)
    assert content == "" and json.loads(found.arguments) == arguments
    assert isinstance(found, ToolCall) and found.name == "weather"


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        (None, "required", "tool_choice"),
        ([], "required", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "tool_choice.function.name"),
        (TOOLS, {"type": "function"}, "tool_choice.function"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice"),
        ([{}], "required", "tools[0].type"),
    ],
)
def test_a_bad_choice_names_the_field(tools: Any, choice: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        ToolUse.of({"tools": tools, "tool_choice": choice})
    assert caught.value.field == field


def test_a_choice_is_a_form_of_the_answer() -> None:
    prompt = {"tools": TOOLS, "tool_choice": "required"}
    params = ToolUse.of(prompt).with_grammar(None)
    assert params is not None and params.structured is not None
    assert params.structured.lark == ToolUse(TOOLS, "required").grammar()
    assert ToolUse.of({**prompt, "tool_choice": "auto"}).with_grammar(None) is None
    with pytest.raises(InputError, match=r"^tool_choice: "):
        ToolUse.of(prompt).with_grammar(params)
    many = {"type": "object", "properties": {f"x{i}": {"type": "string"} for i in range(4000)}}
    large = [{"type": "function", "function": {"name": "a", "parameters": many}}]
    with pytest.raises(InputError, match=r"^tools: the schemas exceed 65536 bytes"):
        ToolUse(large, "required").with_grammar(None)
