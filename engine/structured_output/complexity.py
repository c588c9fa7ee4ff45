"""Forms in which one text has to have many forms at once: `&` of Lark, `allOf` and the like of JSON
schemas.

One step of llguidance's lexer may go through all subsets of these, which none of its limits counts:
thirty in a form of a kilobyte take whatever time and memory there is. So they are counted here. So
are `patternProperties`, each of which is held against each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from ...scheduler.structured import StructuredOutput
from .json_schema import decimal_parts, is_number

MAX_JOINED = 8  # at so many a form takes some hundredths of a second to compile
MAX_PATTERN_PROPERTIES = 64  # 600 took over ten seconds
JOINING = ("allOf", "anyOf", "oneOf", "$ref")
SILENT = {  # keywords that say nothing of a value
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
    *("writeOnly", "discriminator", "x-guidance", "$comment", "$id", "$schema", "$anchor"),
    *("$defs", "definitions"),
}
SCHEMA = "%json"  # Lark's word before a JSON schema

_JSON = json.JSONDecoder()


def too_joined(form: StructuredOutput) -> str:
    """Why a form is not compiled; empty where it may be."""
    if form.json_schema is not None:
        return _in_schema(json.loads(str(form.json_schema)))
    if form.lark is None:
        return ""
    if form.lark.count("&") > MAX_JOINED:
        return f"has '&' over {MAX_JOINED} times; simplify it (in a text, '&' may be \\u0026)"
    try:
        return next(filter(None, (_in_schema(part) for _, _, part in schemas_in(form.lark))), "")
    except (ValueError, RecursionError):
        return f"has {SCHEMA} without a schema behind it"


def schemas_in(lark: str) -> Iterator[tuple[int, int, Any]]:
    """Yield (start, end, schema) of each JSON schema in a Lark grammar. Raises ValueError,
    RecursionError."""
    end = 0
    while (at := lark.find(SCHEMA, end)) >= 0:
        rest = lark[at + len(SCHEMA) :].lstrip()
        start = len(lark) - len(rest)
        schema, size = _JSON.raw_decode(rest)
        end = start + size  # what stands within a schema is its text
        yield start, end, schema


def _in_schema(schema: Any) -> str:
    """Which of its patterns meet in one text is not worked out: where any may, all are counted."""
    found: set[tuple[str, str]] = set()
    multiples: set[int | float] = set()
    num_names, is_joined, left = 0, False, [schema]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left.extend(node)
        elif isinstance(node, dict):
            found |= {(key, node[key]) for key in ("pattern", "format") if _is_text(node, key)}
            is_joined = is_joined or _joins(node)
            if is_number(node.get("multipleOf")):
                multiples.add(abs(node["multipleOf"]))
            names = node.get("patternProperties")
            num_names += len(names) if isinstance(names, dict) else 0
            left.extend(node.values())  # data too: a property or `$ref` may lead into all of it
    if num_names > MAX_PATTERN_PROPERTIES:
        return f"has {num_names} patternProperties; at most {MAX_PATTERN_PROPERTIES}"
    if is_joined and len(multiples) > 1 and _common_multiple_bound(multiples) >= 2**32:
        return "joins schemas (as allOf does) whose multipleOf are too large together; use one"
    if not is_joined or len(found) <= MAX_JOINED:
        return ""
    text = f"joins forms (as allOf does), and has {len(found)} patterns and formats"
    return f"{text}; at most {MAX_JOINED} then"


def _joins(node: dict[str, Any]) -> bool:
    """Whether a value has to be as one part says, and as another does too."""
    parts = node.get("allOf")
    if isinstance(parts, list) and len(parts) > 1:
        return True
    return any(isinstance(node.get(key), str | list) for key in JOINING) and (
        len(node.keys() - SILENT) > 1
    )


def _common_multiple_bound(multiples: Iterable[int | float]) -> int:
    """Return a bound of what the library computes, in 32 bits, for the least common multiple."""
    parts = [decimal_parts(each) for each in multiples]
    most = max(decimals for _, decimals in parts)
    return math.prod(max(1, part) * 10 ** (most - decimals) for part, decimals in parts)


def _is_text(node: dict[str, Any], key: str) -> bool:
    return isinstance(node.get(key), str)
