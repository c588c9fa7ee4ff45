"""Make JSON schemas exact for llguidance, or raise why that is not possible.

The library computes with doubles, allows a declared name to be repeated with escapes, and has
imprecise formats. So numbers that it would round are rejected, escapes are restricted where names
could collide, and formats are replaced by patterns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeGuard

from ...scheduler.params import truncated_repr
from .formats import FORMATS

MAX_EXACT = 2**53 - 1  # doubles, and hence JavaScript clients, represent integers up to here
MAX_INT64 = 2**63 - 1
MAX_MULTIPLE = 100_000  # of multipleOf without its decimal point; compiling takes as many states
MAX_DECIMALS = 8

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # name -> schema
CONSTANTS = ("enum", "const")
DATA = (*CONSTANTS, "default", "examples")  # keywords whose values are not schemas
OPTIONS = "x-guidance"  # llguidance's own keyword
PLAIN_ESCAPES = 'nrbtf\\"'  # without \uXXXX
NEEDS_UNICODE_ESCAPE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")


class UnsupportedSchema(ValueError):
    """A schema cannot be enforced exactly. The message names the part and the fix."""


def make_exact(schema: dict[str, Any]) -> bool:
    """Make a schema exact in place; return whether it changed. Raises `UnsupportedSchema`."""
    is_changed, has_open_names, texts = False, False, ""
    for node in _schemas_in(schema):
        _check_reference(node.get("$ref"))
        _check_bounds(node)
        _check_narrow_range(node)
        _check_multiple(node.get("multipleOf"))
        _check_min_properties(node)
        for number in _constants(node, (int, float)):
            _check_constant(number)
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


def _schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield all subschemas, also under unknown keywords, since a $ref may point there."""
    left = [schema]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left.extend(node)
        elif isinstance(node, dict):
            yield node
            for key, value in node.items():
                if key in NAMED and isinstance(value, dict):
                    left.extend(value.values())
                elif key not in DATA and key != OPTIONS:
                    left.append(value)


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


def _check_constant(number: int | float) -> None:
    if not abs(number) <= MAX_EXACT:
        raise UnsupportedSchema(
            f"has the constant {truncated_repr(number)}: numbers beyond ±{MAX_EXACT} would be "
            "rounded; use a string"
        )


def _check_bounds(node: Mapping[str, Any]) -> None:
    for key in BOUNDS:
        bound = node.get(key)
        if is_number(bound) and not _is_exact_bound(node, key, bound):
            raise UnsupportedSchema(
                f"has {key}: {truncated_repr(bound)}: bounds beyond ±{MAX_EXACT} would be rounded; "
                "use a smaller one, or remove it"
            )


def _check_narrow_range(node: Mapping[str, Any]) -> None:
    """Reject an exclusive integer bound if the range ends before the next integer.

    llguidance would include the bound.
    """
    low, high = _tightest(node, max, "minimum"), _tightest(node, min, "maximum")
    for key, sign, other in (("exclusiveMinimum", 1, high), ("exclusiveMaximum", -1, low)):
        bound = node.get(key)
        if other is None or not is_number(bound) or node.get("type") == "integer":
            continue
        if bound == int(bound) and 0 < sign * (other - bound) < 1:
            raise UnsupportedSchema(
                f"has {key}: {truncated_repr(bound)} and ends at {truncated_repr(other)}, before "
                "the next integer: that bound would be included; use an inclusive bound"
            )


def _tightest(
    node: Mapping[str, Any], choose: Callable[[list[float]], float], name: str
) -> float | None:
    keys = (name, f"exclusive{name.capitalize()}")
    bounds = [node[key] for key in keys if is_number(node.get(key))]
    return choose(bounds) if bounds else None


def _is_exact_bound(node: Mapping[str, Any], key: str, bound: int | float) -> bool:
    """Return whether llguidance enforces a bound exactly; for integers, also some of 64 bits."""
    if abs(bound) <= MAX_EXACT:
        return True
    if node.get("type") != "integer" or "multipleOf" in node or not math.isfinite(bound):
        return False
    if key == "maximum":
        return bound == MAX_INT64 or (0 < bound < MAX_INT64 and int(float(bound)) == bound)
    return key == "minimum" and -MAX_INT64 < bound < 0 and int(float(bound)) == bound


def _check_multiple(multiple: Any) -> None:
    if not is_number(multiple):
        return
    coefficient, decimals = decimal_parts(multiple)
    if coefficient > MAX_MULTIPLE or decimals > MAX_DECIMALS:
        raise UnsupportedSchema(
            f"has multipleOf: {truncated_repr(multiple)}: the maximum is {MAX_MULTIPLE} without "
            f"the decimal point, and {MAX_DECIMALS} decimal places"
        )


def decimal_parts(number: int | float) -> tuple[int, int]:
    """Return (coefficient, decimal places) of a number's absolute value."""
    exact = Decimal(repr(abs(number)))
    if not exact.is_finite():
        return MAX_MULTIPLE + 1, 0
    _, digits, exponent = exact.normalize().as_tuple()
    assert isinstance(exponent, int)
    coefficient = int("".join(map(str, digits)))
    if exponent > 0:
        coefficient = MAX_MULTIPLE + 1 if exponent > MAX_DECIMALS else coefficient * 10**exponent
    return coefficient, max(0, -exponent)


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


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
