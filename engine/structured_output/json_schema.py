"""Make JSON schemas exact for llguidance, or raise why that is not possible.

The library computes with doubles, allows a declared name to be repeated with escapes, and has
imprecise formats. So numbers that it would round are rejected, escapes are restricted where names
could collide, and formats are replaced by patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...scheduler.params import truncated_repr
from .formats import FORMATS
from .joins import joined_groups
from .number_bounds import check_constant, check_multiple, make_bounds_exact
from .rewrites import rewrite
from .subschemas import CONSTANTS, DATA, NAMED, OPTIONS, UnsupportedSchema, is_number, subschemas

PLAIN_ESCAPES = 'nrbtf\\"'  # without \uXXXX
NEEDS_UNICODE_ESCAPE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")


def make_exact(schema: dict[str, Any]) -> bool:
    """Make a schema exact in place; return whether it changed. Raises `UnsupportedSchema`."""
    has_open_names, texts = False, ""
    is_changed = rewrite(schema)
    is_changed = make_bounds_exact(joined_groups(schema)) or is_changed
    for node in subschemas(schema):
        _check_reference(node.get("$ref"))
        check_multiple(node.get("multipleOf"))
        _check_min_properties(node)
        for number in _constants(node, (int, float)):
            check_constant(number)
        texts = texts or next(filter(NEEDS_UNICODE_ESCAPE.search, _constants(node, (str,))), "")
        has_open_names = has_open_names or _has_open_names(node)
        is_changed = _replace_format(node) or is_changed
    _check_options(schema.get(OPTIONS))
    if not has_open_names:
        return is_changed
    if texts:
        raise UnsupportedSchema(
            f"has the constant {truncated_repr(texts)}, whose control characters need \\u escapes, "
            "and objects with undeclared properties; set additionalProperties to false"
        )
    options = schema.get(OPTIONS, {})
    if isinstance(options, dict):
        schema[OPTIONS] = {**options, "json_allowed_escapes": PLAIN_ESCAPES}
    return True


def _check_options(options: Any) -> None:
    """Require separators to differ in spaces only, so that numbers stay delimited."""
    for name, mark in (("item_separator", ","), ("key_separator", ":")):
        if isinstance(options, dict) and str(options.get(name, mark)).strip(" ") != mark:
            value = truncated_repr(options[name])
            text = f"has {OPTIONS}.{name}: {value}: must be {mark!r} with spaces"
            raise UnsupportedSchema(text)


def _constants(node: Mapping[str, Any], kinds: tuple[type, ...]) -> Iterator[Any]:
    """Yield values of these types within enum and const, including property names."""
    left = [node[key] for key in CONSTANTS if key in node]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend((*value, *value.values()))
        elif isinstance(value, kinds) and not isinstance(value, bool):
            yield value


def _check_min_properties(node: Mapping[str, Any]) -> None:
    """Reject a minProperties that needs undeclared names, since an answer may repeat those."""
    least, required = node.get("minProperties"), node.get("required")
    count = len(required) if isinstance(required, list) else 0
    is_open = node.get("additionalProperties") is not False or node.get("patternProperties")
    if is_number(least) and least > count + 1 and is_open:
        raise UnsupportedSchema(
            f"has minProperties: {truncated_repr(least)}: at most one more than the required "
            "names, since an answer may repeat undeclared names; list the names, or remove it"
        )


def _has_open_names(node: Mapping[str, Any]) -> bool:
    """Return whether an object may have undeclared names in addition to declared ones."""
    is_declared = any(node.get(key) for key in ("properties", "patternProperties", "required"))
    return is_declared and (
        node.get("additionalProperties") is not False or bool(node.get("patternProperties"))
    )


def _check_reference(reference: Any) -> None:
    """Reject references into data, which is not made exact."""
    if not isinstance(reference, str):
        return
    is_name = False
    for part in reference.partition("#")[2].split("/")[1:]:
        if part in DATA and not is_name:
            raise UnsupportedSchema(
                f"has $ref to {truncated_repr(reference)}, which points into {part}; move the "
                "target to $defs"
            )
        is_name = part in NAMED and not is_name


def _replace_format(node: dict[str, Any]) -> bool:
    """Replace a format by patterns, in addition to existing ones."""
    name = node.get("format")
    patterns = FORMATS.get(name, ()) if isinstance(name, str) else ()
    if not patterns:
        return False
    del node["format"]
    if "pattern" not in node:
        node["pattern"], patterns = patterns[0], patterns[1:]
    if patterns:
        others = node.get("allOf", [])
        if isinstance(others, list):
            node["allOf"] = [*others, *({"pattern": pattern} for pattern in patterns)]
    return True
