"""Complexity limits for grammars that require several patterns to match at once.

Such grammars use `&` in Lark, or `allOf` and similar keywords in JSON schemas. One step of
llguidance's lexer may visit all subsets of the patterns, which its own limits do not count: thirty
patterns in a kilobyte exhaust time and memory. So they are counted here, as are
`patternProperties`, which llguidance compares pairwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from ...scheduler.structured import StructuredOutput
from .json_schema import decimal_parts, is_number

MAX_JOINED = 8  # compiles in some hundredths of a second
MAX_PATTERN_PROPERTIES = 64  # 600 took over ten seconds
JOINING = ("allOf", "anyOf", "oneOf", "$ref")
SILENT = {  # keywords that do not constrain the value
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
    *("writeOnly", "discriminator", "x-guidance", "$comment", "$id", "$schema", "$anchor"),
    *("$defs", "definitions"),
}
SCHEMA = "%json"  # llguidance's directive before a JSON schema in Lark

_JSON = json.JSONDecoder()


def too_joined(form: StructuredOutput) -> str:
    """Return why a grammar is too complex to compile; "" if it is not."""
    if form.json_schema is not None:
        return _in_schema(json.loads(str(form.json_schema)))
    if form.lark is None:
        return ""
    if form.lark.count("&") > MAX_JOINED:
        return (
            f"has more than {MAX_JOINED} '&'; simplify it (in a string literal, write \\u0026 "
            "for '&')"
        )
    try:
        return next(filter(None, (_in_schema(part) for _, _, part in schemas_in(form.lark))), "")
    except (ValueError, RecursionError):
        return f"has {SCHEMA} without a valid JSON schema after it"


def schemas_in(lark: str) -> Iterator[tuple[int, int, Any]]:
    """Yield (start, end, schema) of each JSON schema in a Lark grammar.

    Raises ValueError or RecursionError for invalid JSON.
    """
    end = 0
    while (at := lark.find(SCHEMA, end)) >= 0:
        rest = lark[at + len(SCHEMA) :].lstrip()
        start = len(lark) - len(rest)
        schema, size = _JSON.raw_decode(rest)
        end = start + size  # Skip the schema: its strings may contain the directive.
        yield start, end, schema


def _in_schema(schema: Any) -> str:
    """Check a schema. If any schemas are combined, all patterns in it are counted."""
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
            left.extend(node.values())  # Include data, since a `$ref` may point into it.
    if num_names > MAX_PATTERN_PROPERTIES:
        return f"has {num_names} patternProperties; the maximum is {MAX_PATTERN_PROPERTIES}"
    if is_joined and len(multiples) > 1 and _common_multiple_bound(multiples) >= 2**32:
        return (
            "combines schemas (allOf, anyOf, oneOf, $ref) whose multipleOf values are too large "
            "together; use a single multipleOf"
        )
    if not is_joined or len(found) <= MAX_JOINED:
        return ""
    return (
        f"combines schemas (allOf, anyOf, oneOf, $ref) with {len(found)} pattern/format "
        f"keywords; the maximum is {MAX_JOINED}"
    )


def _joins(node: dict[str, Any]) -> bool:
    """Return whether a value must match several parts of a schema at once."""
    parts = node.get("allOf")
    if isinstance(parts, list) and len(parts) > 1:
        return True
    return any(isinstance(node.get(key), str | list) for key in JOINING) and (
        len(node.keys() - SILENT) > 1
    )


def _common_multiple_bound(multiples: Iterable[int | float]) -> int:
    """Return an upper bound of the least common multiple, which llguidance computes in 32 bits."""
    parts = [decimal_parts(each) for each in multiples]
    most = max(decimals for _, decimals in parts)
    return math.prod(max(1, part) * 10 ** (most - decimals) for part, decimals in parts)


def _is_text(node: dict[str, Any], key: str) -> bool:
    return isinstance(node.get(key), str)
