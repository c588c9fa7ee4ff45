"""Forms that join forms: what llguidance would follow through all subsets is refused before."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo import StructuredOutput
from octavo.engine.structured_output.complexity import MAX_JOINED, too_joined
from octavo.engine.tool_calling.tool_choice import ToolUse

PATTERNS = [{"type": "string", "pattern": f"^.*a.{{{n}}}b.*$"} for n in range(MAX_JOINED + 1)]
TERMS = [f"/.*a.{{{n}}}b.*/" for n in range(MAX_JOINED + 2)]


def nested() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for each in PATTERNS:
        schema = {**each, "anyOf": [schema]}
    return schema


def chained() -> dict[str, Any]:
    chain = {f"a{i}": {**each, "$ref": f"#/$defs/a{i + 1}"} for i, each in enumerate(PATTERNS)}
    chain[f"a{len(PATTERNS)}"] = {"type": "string"}
    return {"$ref": "#/$defs/a0", "$defs": chain}


JOINED: dict[str, dict[str, Any]] = {
    "all_of": {"json_schema": {"allOf": PATTERNS}},
    "of_properties": {"json_schema": {"allOf": [{"properties": {"a": p}} for p in PATTERNS]}},
    "nested": {"json_schema": nested()},
    "chained": {"json_schema": chained()},
    "in_lark": {"lark": f"start: %json {json.dumps(nested())}"},
    "lark": {"lark": f"start: A\nA: {' & '.join(TERMS)}"},
    "a_property": {"json_schema": {"properties": {"default": {"allOf": PATTERNS}}}},
    "a_definition": {"json_schema": {"$ref": "#/$defs/enum", "$defs": {"enum": nested()}}},
    "data": {"json_schema": {"$ref": "#/examples", "examples": {"allOf": PATTERNS}}},
    "of_items": {"json_schema": {"allOf": [{"items": each} for each in PATTERNS]}},
    "of_open_names": {
        "json_schema": {"allOf": [{"additionalProperties": each} for each in PATTERNS]}
    },
    "of_alternatives": {"json_schema": {"allOf": [{"anyOf": [each, {}]} for each in PATTERNS]}},
    "of_recursion": {
        "json_schema": {
            "$defs": {"a": {"items": {"allOf": [*PATTERNS, {"$ref": "#/$defs/a"}]}}},
            "$ref": "#/$defs/a",
        }
    },
    "unknown_reference": {"json_schema": {"$ref": "#a", "properties": {"a": {"items": PATTERNS}}}},
}
NOT_JOINED: dict[str, dict[str, Any]] = {
    "properties": {"json_schema": {"properties": {str(i): p for i, p in enumerate(PATTERNS)}}},
    "any_of": {"json_schema": {"title": "any", "default": None, "anyOf": PATTERNS}},
    "unrelated": {
        "json_schema": {
            "type": "object",
            "properties": {str(i): each for i, each in enumerate(PATTERNS)},
            "allOf": [{"required": ["1"]}, {"properties": {"z": {"format": "date"}}}],
        }
    },
    "alternatives": {"json_schema": {"type": "string", "minLength": 1, "anyOf": PATTERNS}},
    "references": {
        "json_schema": {
            "$defs": {"a": {"allOf": [{"items": each} for each in PATTERNS[:5]]}},
            "properties": {"a": {"$ref": "#/$defs/a", "title": "A"}},
            "additionalProperties": {"anyOf": PATTERNS},
        }
    },
    "few": {"json_schema": {"allOf": PATTERNS[:MAX_JOINED]}},
    "plain": {"json_schema": {"allOf": [{"properties": {"a": {}}}, {"required": ["a"]}]}},
    "a_text": {"lark": 'start: %json {"description": "%json in a text"} "b"'},
    "lark": {"lark": f"start: A\nA: {' & '.join(TERMS[: MAX_JOINED + 1])}"},
}


@pytest.mark.parametrize("name", sorted(JOINED))
def test_many_forms_of_one_text_are_rejected(name: str) -> None:
    assert str(MAX_JOINED) in too_joined(StructuredOutput(**JOINED[name]))


@pytest.mark.parametrize("name", sorted(NOT_JOINED))
def test_many_forms_of_many_texts_are_not(name: str) -> None:
    assert too_joined(StructuredOutput(**NOT_JOINED[name])) == ""


@pytest.mark.parametrize(("count", "is_refused"), [(64, False), (65, True)])
def test_pattern_properties_are_few(count: int, is_refused: bool) -> None:
    """In all of a schema: `allOf` may bring them together."""
    parts = [{"patternProperties": {f"^{at}_": {}}} for at in range(count)]
    reason = too_joined(StructuredOutput(json_schema={"allOf": parts}))
    assert ("patternProperties" in reason) == is_refused


def test_a_schema_that_cannot_be_read_is_no_way_around() -> None:
    assert "%json" in too_joined(StructuredOutput(lark="start: %json // {}"))


def test_what_a_tool_says_of_itself_joins_nothing() -> None:
    described = {"type": "object", "description": "R&D " * 20}
    tool = {"type": "function", "function": {"name": "find", "parameters": described}}
    assert too_joined(StructuredOutput(lark=ToolUse([tool], "required").grammar())) == ""


def test_very_many_groups_are_counted_together() -> None:
    """Without visiting each choice of alternatives."""
    unions = [{"anyOf": [{"pattern": f"a{n}"}, {"pattern": f"b{n}"}]} for n in range(30)]
    assert "60 pattern/format" in too_joined(StructuredOutput(json_schema={"allOf": unions}))
