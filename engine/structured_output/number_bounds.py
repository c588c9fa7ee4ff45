"""Enforce the numbers of JSON schemas exactly, or raise why that is not possible.

llguidance computes with doubles, and with 64-bit integers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from ...scheduler.params import truncated_repr
from .joins import Group, Joined
from .subschemas import UnsupportedSchema, is_number

MAX_EXACT = 2**53 - 1  # doubles, and hence JavaScript clients, represent integers up to here
MAX_INT64 = 2**63 - 1
MAX_DOUBLE_INT64 = 2**63 - 1024  # the largest double within 64 bits
MAX_MULTIPLE = 100_000  # of multipleOf without its decimal point; compiling takes as many states
MAX_DECIMALS = 8

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def make_bounds_exact(joined: Joined) -> bool:
    """Tighten bounds beyond 64 bits to ones that are exact; return whether any changed.

    Answers still satisfy the schema, but do not contain the numbers in between. Raises
    `UnsupportedSchema` for bounds that cannot be enforced.
    """
    parts = [_fractional(group, joined.is_exact) for group in joined.groups]
    fractional_ids = {id(node) for part in parts for node in part}
    nodes = {id(node): node for group in joined.groups for node in group}
    changes = [_tighten(node, key in fractional_ids) for key, node in nodes.items()]
    for part in parts:
        _check_narrow_range(part)
    return any(changes)


def _fractional(group: Group, is_exact: bool) -> Sequence[Mapping[str, Any]]:
    """Return the subschemas of a group that may apply to a fraction."""
    found = [node for node in group if _allows_fractions(node)]
    return [] if is_exact and len(found) < len(group) else found


def _allows_fractions(node: Mapping[str, Any]) -> bool:
    kinds = node.get("type", "number")
    return "number" in kinds if isinstance(kinds, str | list) else True


def _tighten(node: dict[str, Any], is_fractional: bool) -> bool:
    is_changed = False
    for key in BOUNDS:
        bound = node.get(key)
        if not is_number(bound):
            continue
        limit = _loose_limit(key, bound, is_fractional)
        if limit is not None:
            node[key], is_changed = limit, True
        elif not _is_exact_bound(node, key, bound, is_fractional):
            raise UnsupportedSchema(
                f"has {key}: {truncated_repr(bound)}: bounds beyond ±{MAX_EXACT} would be rounded; "
                "use a smaller one, or remove it"
            )
    return is_changed


def _loose_limit(key: str, bound: int | float, is_fractional: bool) -> int | None:
    """Return the limit that replaces a bound that excludes no 64-bit integer; None for others."""
    sign = -1 if key in ("minimum", "exclusiveMinimum") else 1
    if not MAX_INT64 <= sign * bound < math.inf:
        return None
    is_exact = key == "maximum" and not is_fractional
    return MAX_INT64 if is_exact else sign * MAX_DOUBLE_INT64


def _is_exact_bound(
    node: Mapping[str, Any], key: str, bound: int | float, is_fractional: bool
) -> bool:
    """Return whether llguidance enforces a bound exactly; for integers, also some of 64 bits."""
    if abs(bound) <= MAX_EXACT:
        return True
    if is_fractional or "multipleOf" in node or not abs(bound) < MAX_INT64:
        return False
    sign = {"minimum": -1, "maximum": 1}.get(key, 0)
    return sign * bound > 0 and int(float(bound)) == bound


def _check_narrow_range(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Reject an exclusive integer bound if the range ends before the next integer.

    llguidance would include the bound.
    """
    found = {key: {b for node in nodes if is_number(b := node.get(key))} for key in BOUNDS}
    for key, sign, opposite in (
        ("exclusiveMinimum", 1, "aximum"),
        ("exclusiveMaximum", -1, "inimum"),
    ):
        names = [name for name in BOUNDS if name.endswith(opposite)]
        ends = sorted(sign * end for name in names for end in found[name])
        for bound in found[key]:
            index = bisect_right(ends, sign * bound)
            if bound == int(bound) and index < len(ends) and ends[index] - sign * bound < 1:
                raise UnsupportedSchema(
                    f"has {key}: {truncated_repr(bound)} and ends at "
                    f"{truncated_repr(sign * ends[index])}, before the next integer: that bound "
                    "would be included; use an inclusive bound"
                )


def check_constant(number: int | float) -> None:
    if not abs(number) <= MAX_EXACT:
        raise UnsupportedSchema(
            f"has the constant {truncated_repr(number)}: numbers beyond ±{MAX_EXACT} would be "
            "rounded; use a string"
        )


def check_multiple(multiple: Any) -> None:
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
