"""Convert a structured output to the grammar text that llguidance compiles."""

from __future__ import annotations

import json
from typing import Any

from ...scheduler.structured import StructuredOutput
from .complexity import schemas_in, too_joined
from .json_schema import make_exact
from .subschemas import UnsupportedSchema

MAX_TEXT = 1 << 19  # characters; a schema grows when its formats become patterns
# Without this, llguidance emits forced bytes endlessly for `A "a"` with `A: /a+/`, since they never
# lead to the end of A.
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
# White space is bounded, since a small model may write it endlessly. Unknown keywords are rejected.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"( |\n {0,20})?", "lenient": False}


def grammar_text(form: StructuredOutput) -> str:
    """Return the grammar text. Raises `UnsupportedSchema`, or ValueError from llguidance."""
    from llguidance import LLMatcher

    if reason := too_joined(form):
        raise UnsupportedSchema(reason)
    if form.json_schema is not None:
        schema = json.loads(str(form.json_schema))
        text = _to_json(schema) if make_exact(schema) else str(form.json_schema)
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.lark is not None:
        return LLMatcher.grammar_from_lark(_exact_lark(form.lark) + NO_FORCING)
    choice = " | ".join(map(json.dumps, form.choice))
    return LLMatcher.grammar_from_lark(f"start: {choice}{NO_FORCING}")


def _exact_lark(lark: str) -> str:
    """Make the schemas of a Lark grammar exact."""
    parts, end = [], 0
    for start, after, schema in schemas_in(lark):
        if isinstance(schema, dict) and make_exact(schema):
            parts += [lark[end:start], _to_json(schema)]
            end = after
    return _bounded("".join([*parts, lark[end:]]))


def _to_json(schema: dict[str, Any]) -> str:
    try:
        return _bounded(json.dumps(schema, allow_nan=False))
    except RecursionError:
        raise UnsupportedSchema("is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, UnsupportedSchema):
            raise
        raise UnsupportedSchema("has NaN or an infinite number, which is not JSON") from None


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise UnsupportedSchema("has too many formats; remove some")
    return text
