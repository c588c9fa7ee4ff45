"""Schemas that Zod 4.6.7 generates for its types, and keywords that are rewritten for them.

`zod_schemas.json`: `z.toJSONSchema(z.object({x: type}))` of 61 types.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import llguidance
import pytest

from octavo import StructuredOutput
from octavo.engine.structured_output.error_messages import reason_of
from octavo.engine.structured_output.grammar_text import grammar_text
from octavo.engine.structured_output.subschemas import UnsupportedSchema

BYTES = llguidance.LLTokenizer("byte")
DATA = Path(__file__).parents[1] / "data"
SCHEMAS: dict[str, dict[str, Any]] = json.loads((DATA / "zod_schemas.json").read_text())
UNSUPPORTED = {
    "dur": r"pattern '\^P.*look-around is not supported",
    "emoji": "pattern '.*look-around is not supported",
    "host": "pattern '.*look-around is not supported",
    "jwt": "format 'jwt' is not supported",
}


def matcher_of(schema: Any) -> Any:
    """Compile a schema. Raises ValueError with the message for the client."""
    text = grammar_text(StructuredOutput(json_schema=schema))
    matcher = llguidance.LLMatcher(BYTES, text, log_level=0)
    if matcher.is_error():
        raise UnsupportedSchema(reason_of(matcher.get_error(), "json_schema"))
    return matcher


def allows(schema: Any, text: str) -> bool:
    state, tokens = matcher_of(schema), BYTES.tokenize_str(text)
    is_read = state.validate_tokens(tokens) == len(tokens) and state.consume_tokens(tokens)
    return bool(is_read and state.is_accepting())


def exact(text: str) -> Any:
    """Parse JSON with decimals, since 2.34 is not a multiple of 0.01 as a double."""
    return json.loads(text, parse_float=Decimal)


def random_answer(matcher: Any, rng: Random) -> str | None:
    """Return a random answer that prefers to close strings and objects; None if it gets long."""
    state, written = matcher.deep_copy(), bytearray()
    while len(written) < 400 and not state.is_stopped():
        mask = state.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        closing = [byte for byte in b'"]}' if byte in allowed]
        written.append(rng.choice(closing if closing and rng.random() < 0.3 else allowed))
        assert state.consume_token(written[-1])
    return written.decode() if state.is_accepting() else None


def test_zod_types_outside_the_known_ones_are_supported() -> None:
    assert len(SCHEMAS) == 61 and len(UNSUPPORTED) <= 4


@pytest.mark.parametrize("name", sorted(SCHEMAS.keys() - UNSUPPORTED))
def test_answers_satisfy_the_schemas_of_zod(name: str) -> None:
    matcher = matcher_of(SCHEMAS[name])
    validator = jsonschema.Draft202012Validator(exact(json.dumps(SCHEMAS[name])))
    rng, num_complete = Random(name), 0
    for _ in range(40):
        answer = random_answer(matcher, rng)
        if answer is not None:
            validator.validate(exact(answer))
            num_complete += 1
    assert num_complete


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_types_of_zod_are_rejected_with_keyword_and_value(name: str) -> None:
    with pytest.raises(UnsupportedSchema, match=UNSUPPORTED[name]):
        matcher_of(SCHEMAS[name])


NAMES = {"enum": ["a", "b"]}
RECORDS: list[tuple[dict[str, Any], dict[str, bool]]] = [
    ({"propertyNames": {"type": "string"}}, {'{"c":1}': True}),
    ({"propertyNames": True, "additionalProperties": {"type": "null"}}, {'{"c":1}': False}),
    ({"propertyNames": NAMES}, {'{"a":1,"b":[]}': True, '{"c":1}': False, "{}": True}),
    ({"propertyNames": {"const": "a"}}, {'{"a":1}': True, '{"c":1}': False}),
    ({"propertyNames": NAMES, "required": ["a"]}, {'{"a":1}': True, "{}": False}),
    ({"propertyNames": NAMES, "properties": {"a": {"const": 1}, "c": {}},
      "additionalProperties": {"const": 2}}, {'{"a":1,"b":2}': True, '{"c":1}': False}),
    ({"propertyNames": NAMES, "additionalProperties": {"format": "date"}},
     {'{"a":"2024-01-01"}': True, '{"a":"x"}': False}),
    ({"propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": {"type": "null"}},
     {'{"a":null}': True, '{"c":null}': False, '{"a":1}': False}),
    ({"propertyNames": {"$ref": "#/$defs/n"}, "$defs": {"n": NAMES}},
     {'{"a":1}': True, '{"c":1}': False}),
    ({"allOf": [{"propertyNames": NAMES}, {"properties": {"a": {"const": 1}}}]},
     {'{"a":1}': True, '{"a":2}': False, '{"c":1}': False}),
    ({"properties": {"a": {"not": {}}}}, {'{"b":1}': True, '{"a":1}': False}),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(RECORDS)))
def test_property_names_are_enforced(index: int) -> None:
    schema, texts = RECORDS[index]
    for text, expected in texts.items():
        assert allows({"type": "object", **schema}, text) == expected
        kind = jsonschema.Draft202012Validator
        validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
        assert validator.is_valid(json.loads(text)) == expected


def test_nested_records_do_not_repeat_their_values() -> None:
    names = {"enum": [str(index) for index in range(20)]}
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(10):
        schema = {"type": "object", "propertyNames": names, "additionalProperties": schema}
    assert allows(schema, '{"1":{"2":{}}}')


def test_a_format_next_to_a_pattern_is_an_annotation() -> None:
    schema = {"type": "string", "format": "hue", "pattern": "^[ab]$"}
    assert allows(schema, '"a"') and not allows(schema, '"c"')
    with pytest.raises(UnsupportedSchema, match="format 'hue' is not supported"):
        matcher_of({"type": "string", "format": "hue"})


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"pattern": r"\bfoo\b"}, r"pattern '\\\\bfoo\\\\b': \\b or \\B is not supported"),
    ({"pattern": "a^b"}, r"pattern 'a\^b': '\^' after the start is not supported"),
    ({"pattern": "[a"}, r"pattern '\[a': invalid regular expression"),
    ({"pattern": r"(a)\1"}, r"pattern '\(a\).*': back-references are not supported"),
    ({"maxLength": 10**30}, "maxLength: '1e30': must be of type non-negative integer of 64 bits"),
    ({"minProperties": 5}, "minProperties: 5: at most one more"),
    ({"patternProperties": {"^a": {}, "^ab": {}}}, r"patternProperties '\^a' and '\^ab': a name"),
    ({"propertyNames": {"minLength": 3}}, "propertyNames: {'minLength': 3}: only type"),
]


@pytest.mark.parametrize("index", range(len(REJECTED)))
def test_errors_name_keyword_and_value(index: int) -> None:
    with pytest.raises(UnsupportedSchema, match=REJECTED[index][1]):
        matcher_of(REJECTED[index][0])
