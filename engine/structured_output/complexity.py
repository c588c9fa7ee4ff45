"""Complexity limits for grammars that require several patterns to match at once.

Such grammars use `&` in Lark, or `allOf` and similar keywords in JSON schemas. One step of
llguidance's lexer may visit all subsets of the patterns, which its own limits do not count: thirty
patterns in a kilobyte exhaust time and memory. So those of one
value are counted here, as are `patternProperties`, which llguidance compares pairwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from ...scheduler.structured import StructuredOutput
from .joins import Group, joined_groups
from .number_bounds import decimal_parts
from .subschemas import is_number, subschemas

MAX_JOINED = 8  # compiles in some hundredths of a second
MAX_PATTERN_PROPERTIES = 64  # 600 took over ten seconds
JOINED = ("pattern", "format")
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
    """Check each group of subschemas that a single value must satisfy."""
    names = [node.get("patternProperties") for node in subschemas(schema)]
    num_names = sum(len(each) for each in names if isinstance(each, dict))
    if num_names > MAX_PATTERN_PROPERTIES:
        return f"has {num_names} patternProperties; the maximum is {MAX_PATTERN_PROPERTIES}"
    return next(filter(None, map(_in_group, joined_groups(schema).groups)), "")


def _in_group(group: Group) -> str:
    found = {(key, node[key]) for node in group for key in JOINED if _is_text(node, key)}
    if len(found) > MAX_JOINED:
        return (
            f"combines schemas (allOf, anyOf, oneOf, $ref) with {len(found)} pattern/format "
            f"keywords of one value; the maximum is {MAX_JOINED}"
        )
    multiples = {abs(node["multipleOf"]) for node in group if is_number(node.get("multipleOf"))}
    if len(multiples) > 1 and _common_multiple_bound(multiples) >= 2**32:
        return (
            "combines schemas (allOf, anyOf, oneOf, $ref) whose multipleOf values are too large "
            "together; use a single multipleOf"
        )
    return ""


def _common_multiple_bound(multiples: Iterable[int | float]) -> int:
    """Return an upper bound of the least common multiple, which llguidance computes in 32 bits."""
    parts = [decimal_parts(each) for each in multiples]
    most = max(decimals for _, decimals in parts)
    return math.prod(max(1, part) * 10 ** (most - decimals) for part, decimals in parts)


def _is_text(node: dict[str, Any], key: str) -> bool:
    return isinstance(node.get(key), str)
