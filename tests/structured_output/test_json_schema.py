"""JSON schemas: integers, names and formats of an answer are exactly what the schema says."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import urllib.parse
from random import Random
from typing import Any

import llguidance
import pytest

from octavo import StructuredOutput
from octavo.engine.structured_output.complexity import too_joined
from octavo.engine.structured_output.formats import FORMATS
from octavo.engine.structured_output.grammar_text import grammar_text
from octavo.engine.structured_output.number_bounds import MAX_EXACT, decimal_parts
from octavo.engine.structured_output.subschemas import UnsupportedSchema

BYTES = llguidance.LLTokenizer("byte")


def allows(form: StructuredOutput, *texts: str) -> list[bool]:
    """Whether each text is an answer."""
    matcher = llguidance.LLMatcher(BYTES, grammar_text(form), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    found = []
    for text in texts:
        state, tokens = matcher.deep_copy(), BYTES.tokenize_str(text)
        found.append(state.validate_tokens(tokens) == len(tokens)
                     and state.consume_tokens(tokens) and state.is_accepting())  # fmt: skip
    return found


def schema_allows(schema: Any, *texts: str) -> list[bool]:
    return allows(StructuredOutput(json_schema=schema), *texts)


def lark_allows(schema: Any, *texts: str) -> list[bool]:
    return allows(StructuredOutput(lark=f"start: %json {json.dumps(schema)}"), *texts)


BIG = 1234567890123456789
INEXACT: dict[str, Any] = {
    "enum": {"enum": [1, BIG]},
    "const": {"const": 2**53},
    "negative": {"const": -BIG},
    "unsigned": {"enum": [2**64 - 1]},
    "huge": {"const": 10**400},
    "float": {"const": 1e300},
    "in_data": {"const": {"id": [BIG]}},
    "both": {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 1},
    "minimum": {"type": "integer", "minimum": BIG},
    "maximum": {"type": "number", "maximum": BIG},
    "exclusive": {"type": "integer", "exclusiveMaximum": 2**60},
    "no_type": {"maximum": 2**60},
    "multiple": {"type": "integer", "multipleOf": 2**32 + 1},
    "prime": {"type": "integer", "multipleOf": 999983},
    "decimals": {"multipleOf": 1e-9},
    "infinite": '{"maximum": 1e999}',
    "nested": {"properties": {"id": {"anyOf": [{"items": {"enum": [BIG]}}]}}},
    "definition": {"$defs": {"a": {"const": BIG}}, "$ref": "#/$defs/a"},
}


@pytest.mark.lesson("L42")
@pytest.mark.parametrize("name", sorted(INEXACT))
def test_integers_that_would_be_rounded_are_rejected(name: str) -> None:
    schema = INEXACT[name]
    with pytest.raises(UnsupportedSchema, match=r"has (the constant|multipleOf|m|exclusiveM)\w*"):
        grammar_text(StructuredOutput(json_schema=schema))
    if isinstance(schema, dict):
        with pytest.raises(UnsupportedSchema):
            grammar_text(StructuredOutput(lark=f"start: %json {json.dumps(schema)}"))


@pytest.mark.lesson("L42")
def test_integers_within_the_exact_range_are_exact() -> None:
    for number in (MAX_EXACT, -MAX_EXACT, 2**31, -1):
        texts = [str(number + shift) for shift in (-1, 0, 1)]
        assert schema_allows({"const": number}, *texts) == [False, True, False]
        least = {"type": "integer", "minimum": number, "maximum": number}
        assert schema_allows(least, *texts) == [False, True, False]
    texts = [str(2**63 - 2), str(2**63 - 1), str(2**63), str(BIG)]
    most = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
    assert schema_allows(most, *texts) == [True, True, False, True]
    assert schema_allows({"default": BIG, "examples": [BIG], "type": "integer"}, "7") == [True]
    assert schema_allows({"properties": {"maximum": {"type": "integer"}}}, '{"maximum":1}') == [
        True
    ]
    assert schema_allows({"enum": [str(BIG)]}, f'"{BIG}"') == [True]


def test_multiples_that_overflow_together_are_rejected() -> None:
    parts = [{"multipleOf": 99991}, {"multipleOf": 99989}]
    assert "multipleOf" in too_joined(StructuredOutput(json_schema={"allOf": parts}))
    assert not too_joined(StructuredOutput(json_schema={"prefixItems": parts}))
    assert decimal_parts(0.25) == (25, 2) and decimal_parts(1e3) == (1000, 0)


PINNED: list[dict[str, Any]] = [
    {"type": "object", "properties": {"role": {"enum": ["user"]}}, "required": ["role"]},
    {"type": "object", "properties": {"role": {"enum": ["user"]}},
     "additionalProperties": {"type": "string"}},
    {"type": "object", "patternProperties": {"^role$": {"enum": ["user"]}}},
    {"type": "object", "properties": {"role": {"enum": ["user"]}},
     "patternProperties": {"^r": {"type": "string"}}, "additionalProperties": False},
    {"allOf": [{"properties": {"role": {"enum": ["user"]}}}, {"type": "object"}]},
]  # fmt: skip


@pytest.mark.parametrize("allowed", [schema_allows, lark_allows])
@pytest.mark.parametrize("index", range(len(PINNED)))
def test_a_pinned_property_cannot_be_spelled_again(allowed: Any, index: int) -> None:
    texts = [
        '{"role":"user"}',
        '{"role":"user","role":"admin"}',
        '{"role":"user","\\u0072ole":"admin"}',
        '{"role":"user","rol\\u0065":"admin"}',
        '{"\\u0072ole":"admin"}',
    ]
    assert allowed(PINNED[index], *texts) == [True, False, False, False, False]


def test_names_and_texts_can_be_any() -> None:
    names = ['q"t', "b\\s", "n\nl\ttab\r\b\f", "é", "日本", "👍", "/", "", " "]
    schema = {"type": "object", "properties": {"role": {"enum": ["user"]}}}
    texts = [json.dumps({"role": "user", name: name}, ensure_ascii=False) for name in names]
    assert all(schema_allows(schema, *texts))
    declared = {"type": "object", "properties": {name: {"const": name} for name in names}}
    whole = json.dumps({name: name for name in names}, ensure_ascii=False)
    assert schema_allows(declared, whole) == [True]
    control = {"properties": {"a": {"const": "\x01"}}, "additionalProperties": False}
    assert schema_allows(control, '{"a":"\\u0001"}') == [True]
    assert schema_allows({"type": "object"}, '{"\\u0001":"\\u001b"}') == [True]
    with pytest.raises(UnsupportedSchema, match="additionalProperties to false"):
        grammar_text(StructuredOutput(json_schema={"properties": {"a": {"const": "\x01"}}}))


def test_a_count_of_names_cannot_be_reached_by_repeating_one() -> None:
    with pytest.raises(UnsupportedSchema, match="minProperties"):
        grammar_text(StructuredOutput(json_schema={"type": "object", "minProperties": 2}))
    assert schema_allows({"type": "object", "minProperties": 1}, '{"a":1}', "{}") == [True, False]
    both = {"properties": {"a": {}, "b": {}}, "required": ["a", "b"], "minProperties": 2}
    assert schema_allows(both, '{"a":1,"b":2}') == [True]


def is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def test_dates_are_those_of_the_calendar() -> None:
    """All days of all years, and those around the ends of months."""
    pattern = re.compile(FORMATS["date"][0])
    days = (0, 28, 29, 30, 31, 32)
    for year in range(10_000):
        for month in range(14):
            for day in days:
                text = f"{year:04}-{month:02}-{day:02}"
                assert bool(pattern.match(text)) == is_date(text), text


VALUES: dict[str, dict[str, bool]] = {
    "date": {"2024-02-29": True, "2023-02-29": False, "1900-02-29": False, "2000-02-29": True,
             "0000-01-01": False, "0001-01-01": True, "2023-04-31": False, "9999-12-31": True},
    "time": {"12:00:59Z": True, "12:00:60Z": False, "23:59:60Z": False, "12:00:00": False,
             "12:00:00.123456+01:30": True, "24:00:00Z": False, "12:60:00Z": False},
    "date-time": {"2024-02-29T12:00:59Z": True, "2023-02-29T12:00:59Z": False,
                  "2024-01-01T00:00:60Z": False, "2024-01-01 00:00:00Z": False,
                  "0000-01-01T00:00:00Z": False, "2024-01-01T00:00:00-23:59": True},
    "ipv4": {"0.0.0.0": True, "255.255.255.255": True, "256.0.0.1": False, "01.2.3.4": False},
    "ipv6": {"::": True, "::1": True, "1:2:3:4:5:6:7:8": True, "1::2::3": False, "12345::": False},
    "hostname": {"a.example": True, "-a": False, "a" * 64: False, ".".join(["a" * 60] * 4): True,
                 ".".join(["a" * 60] * 5): False, "x": True},
    "email": {"a.b+c@d.example": True, "a@" + "b" * 64 + ".c": False, "a" * 65 + "@b.c": False,
              "a..b@c.d": False, "@b": False, "a@[1.2.3.4]": True, "a@[1.2.3.256]": False},
    "uri": {"http://a.b:80/c?d#e": True, "http://a:65535": True, "http://a:65536": False,
            "http://[::1]/": True, "http://[1::2::3]/": False, "a b": False, "mailto:a@b": True,
            "//a": False},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(VALUES))
def test_formats_allow_valid_values_alone(name: str) -> None:
    texts = [json.dumps(value) for value in VALUES[name]]
    expected = list(VALUES[name].values())
    assert schema_allows({"type": "string", "format": name}, *texts) == expected
    assert lark_allows({"type": "string", "format": name}, *texts) == expected


def test_a_format_joins_a_pattern_and_is_no_name() -> None:
    joined = {"type": "string", "format": "date", "pattern": "^2", "maxLength": 10}
    assert schema_allows(joined, '"2024-01-01"', '"1999-01-01"', '"2x"') == [True, False, False]
    named = {"properties": {"format": {"const": "date"}, "enum": {"format": "date"}}}
    texts = ['{"format":"date"}', '{"format":"x"}', '{"enum":"2024-01-01"}', '{"enum":"x"}']
    assert schema_allows(named, *texts) == [True, False, True, False]
    assert schema_allows({"const": {"format": "date"}}, '{"format":"date"}') == [True]
    assert schema_allows({"format": "date"}, "5", '"x"') == [True, False]
    with pytest.raises(UnsupportedSchema, match=r"points into examples; move the target to \$defs"):
        far = {"$ref": "#/examples/0", "examples": [{"format": "date"}]}
        grammar_text(StructuredOutput(json_schema=far))


CHECKS = {
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "date-time": datetime.datetime.fromisoformat,
    "uri": lambda text: urllib.parse.urlsplit(text).port,
}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_random_values_of_formats_are_read_by_the_standard_library(name: str) -> None:
    form = StructuredOutput(json_schema={"type": "string", "format": name})
    matcher = llguidance.LLMatcher(BYTES, grammar_text(form), log_level=0)
    rng, num_complete = Random(name), 0
    for _ in range(60):
        state, written = matcher.deep_copy(), bytearray()
        while len(written) < 200 and not state.is_stopped():
            mask = state.compute_bitmask()
            allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
            ends = 34 in allowed and written and rng.random() < 0.2
            written.append(34 if ends else rng.choice(allowed))
            assert state.consume_token(written[-1])
        if state.is_accepting():
            num_complete += 1
            CHECKS[name](json.loads(written))  # type: ignore[operator]
    assert num_complete > 30
