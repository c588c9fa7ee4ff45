"""Bounds of numbers in JSON schemas; jsonschema decides which numbers are valid."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import jsonschema
import llguidance
import pytest

from octavo import StructuredOutput
from octavo.engine.structured_output.grammar_text import grammar_text
from octavo.engine.structured_output.subschemas import UnsupportedSchema

BYTES = llguidance.LLTokenizer("byte")
POWERS = (2**53, 2**60, 2**63, 2**64, 10**30)
NEAR = [sign * power + shift for sign in (1, -1) for power in POWERS for shift in (-1, 0, 1)]
DECIMALS = ("-5.5", "-0.5", "0.05", "0.1", "0.5", "5.05", "5.5", "5.7", "6.5", "8.25")
TEXTS = [*map(str, [*range(-9, 12), *NEAR]), *DECIMALS, "null", '"a"']
LIMITS = [-(2**63) - 1, -(2**63), -(2**60), 2**53, 2**63 - 1, 2**63, 2**64 - 1, 1e300, -3.5e38]
SMALL = [-7, -5, -1, -0.5, 0, 0.1, 1, 3, 5, 5.5, 5.7, 6, 7, 8.25]
TYPES = ["integer", "integer", "number", ["integer", "null"], ["number", "string"]]


def answers(schema: Any) -> list[str]:
    """Return the texts that the grammar of a schema allows."""
    text = grammar_text(StructuredOutput(json_schema=schema))
    matcher = llguidance.LLMatcher(BYTES, text, log_level=0)
    found = []
    for text in () if matcher.is_error() else TEXTS:
        state, tokens = matcher.deep_copy(), BYTES.tokenize_str(text)
        if state.validate_tokens(tokens) == len(tokens):
            state.consume_tokens(tokens)
            found += [text] if state.is_accepting() else []
    return found


def valid(schema: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [text for text in TEXTS if validator.is_valid(json.loads(text))]


INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}
FLOAT32 = {"minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38}
FLOAT64 = {"minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}
GENERATED: dict[str, dict[str, Any]] = {
    "int64": {"type": "integer", **INT64},
    "nullable": {"type": ["integer", "null"], **INT64},
    "uint64": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    "exclusive": {"type": "integer", "exclusiveMinimum": -(2**63) - 1, "exclusiveMaximum": 2**63},
    "multiple": {"type": "integer", "multipleOf": 5, **INT64},
    "float32": {"type": "number", **FLOAT32},
    "float64": {"type": "number", **FLOAT64},
    "joined": {"type": "integer", "allOf": [{"minimum": -(2**63)}, {"maximum": 2**63 - 1}]},
    "any_of": {"anyOf": [{"type": "integer", **INT64}, {"type": "null"}]},
    "reference": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", **INT64}}},
}


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_limits_of_number_types_are_served(name: str) -> None:
    """Integers of up to 63 bits are allowed where valid, and invalid numbers never."""
    found, expected = answers(GENERATED[name]), valid(GENERATED[name])
    assert set(found) <= set(expected)
    assert {text for text in expected if len(text) < 19 and text.strip("-").isdigit()} <= {*found}
    assert ("null" in expected) == ("null" in found)


def test_int64_maximum_is_exact() -> None:
    found = answers(GENERATED["int64"])
    assert str(2**63 - 1) in found and str(2**63) not in found
    assert str(-(2**63) - 1) not in found


@pytest.mark.parametrize(
    "bound", [{"minimum": 2**63}, {"exclusiveMaximum": -(2**63)}, {"minimum": 10**400}]
)
def test_bounds_that_leave_no_64_bit_integer_are_rejected(bound: dict[str, int]) -> None:
    with pytest.raises(UnsupportedSchema, match=f"has {next(iter(bound))}: "):
        answers({"type": "integer", **bound})


NARROW: list[dict[str, Any]] = [
    {"allOf": [{"exclusiveMinimum": 5}, {"maximum": 5.7}]},
    {"exclusiveMinimum": 5, "allOf": [{"exclusiveMaximum": 5.7}]},
    {"$ref": "#/$defs/a", "maximum": 5.7, "$defs": {"a": {"exclusiveMinimum": 5}}},
    {"exclusiveMaximum": 6, "anyOf": [{"type": "null"}, {"minimum": 5.5}]},
    {"allOf": [{"items": {"exclusiveMinimum": 5}}, {"items": {"maximum": 5.7}}]},
    {"properties": {"a": {"exclusiveMinimum": 5}}, "patternProperties": {"^a": {"maximum": 5.7}}},
]


@pytest.mark.parametrize("index", range(len(NARROW)))
def test_narrow_ranges_split_over_subschemas_are_rejected(index: int) -> None:
    with pytest.raises(UnsupportedSchema, match="before the next integer"):
        answers(NARROW[index])


SPLIT: list[dict[str, Any]] = [
    {"type": "integer", "allOf": [{"exclusiveMinimum": 5}, {"exclusiveMaximum": 7}]},
    {"allOf": [{"exclusiveMinimum": 5}, {"maximum": 5.7}, {"type": ["integer", "null"]}]},
    {"allOf": [{"exclusiveMinimum": 5}, {"maximum": 6.5}], "type": "integer"},
    {"anyOf": [{"exclusiveMinimum": 5}, {"maximum": 5.7}], "type": "number"},
]


@pytest.mark.parametrize("index", range(len(SPLIT)))
def test_exclusive_bounds_split_over_subschemas_are_kept(index: int) -> None:
    found = answers(SPLIT[index])
    assert set(found) <= set(valid(SPLIT[index]))
    assert ("6" in found) == ("6" in valid(SPLIT[index]))


def random_part(rng: Random, bounds: list[float]) -> dict[str, Any]:
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    made: dict[str, Any] = {key: rng.choice(bounds) for key in keys if rng.random() < 0.2}
    if rng.random() < 0.1:
        made["multipleOf"] = rng.choice([1, 2, 3, 0.5, 0.25, 1.5])
    if rng.random() < 0.1:
        made["enum"] = rng.sample([0, 1, 3, 5, 6, 7, 5.5, -1, None, "a"], 3)
    if rng.random() < 0.05:
        made["const"] = rng.choice([0, 5, 6, 5.5])
    if rng.random() < 0.4:
        made["type"] = rng.choice(TYPES)
    return made


def random_schema(rng: Random) -> dict[str, Any]:
    """Return bounds spread over siblings, allOf, anyOf and $ref."""
    bounds = SMALL + (LIMITS if rng.random() < 0.4 else [])
    defs: dict[str, Any] = {}

    def part(depth: int) -> dict[str, Any]:
        made = random_part(rng, bounds)
        for key, chance in (("allOf", 0.3), ("anyOf", 0.2)):
            if depth and rng.random() < chance:
                made[key] = [part(depth - 1) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:
            name = f"d{len(defs)}"
            defs[name] = made
            made = {"$ref": f"#/$defs/{name}", **(random_part(rng, bounds) if depth else {})}
        return made

    return {**part(2), "$defs": defs}


def test_random_bounds_allow_valid_numbers_alone() -> None:
    num_answers = 0
    for seed in range(1500):
        schema = random_schema(Random(seed))
        expected = valid(schema)
        try:
            found = answers(schema)
        except UnsupportedSchema:
            continue
        assert set(found) <= set(expected), f"{seed}: {json.dumps(schema)}"
        num_answers += len(found)
    assert num_answers > 10_000


@pytest.mark.parametrize(
    ("bounds", "is_served"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.1}, False),
        ({"exclusiveMinimum": 0, "maximum": 0.1, "exclusiveMaximum": 5}, False),
        ({"exclusiveMaximum": 0, "minimum": -0.5}, False),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, True),
        ({"exclusiveMinimum": 0}, True),
        ({"exclusiveMinimum": 0.1, "exclusiveMaximum": 0.2}, True),
        ({"exclusiveMinimum": 0, "maximum": 1, "type": "integer"}, True),
    ],
)
def test_narrow_ranges_that_would_include_their_bound_are_rejected(
    bounds: dict[str, Any], is_served: bool
) -> None:
    schema = {"type": "number", **bounds}
    if is_served:
        texts = ["0", "0.05", "0.5", "1", "-1"]
        assert set(texts) & set(answers(schema)) == set(texts) & set(valid(schema))
    else:
        with pytest.raises(UnsupportedSchema, match="before the next integer"):
            grammar_text(StructuredOutput(json_schema=schema))


@pytest.mark.parametrize("bound", ["1e999", "NaN", "-1e999"])
def test_bounds_that_are_not_numbers_are_rejected(bound: str) -> None:
    text = '{"minimum": 0.5, "exclusiveMaximum": %s, "allOf": [{"maximum": 1%s}]}'
    with pytest.raises(UnsupportedSchema, match="exclusiveMaximum"):
        answers(text % (bound, "0" * 400))
