"""Traverse the subschemas of a JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

NAMED = ("properties", "patternProperties", "$defs", "definitions")  # name -> schema
CONSTANTS = ("enum", "const")
DATA = (*CONSTANTS, "default", "examples")  # keywords whose values are not schemas
OPTIONS = "x-guidance"  # llguidance's own keyword


class UnsupportedSchema(ValueError):
    """A schema cannot be enforced exactly. The message names the part and the fix."""


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
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


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def target(root: Any, reference: str) -> Any:
    """Return what a JSON pointer such as "#/$defs/a" names. Raises LookupError."""
    if not (reference + "/").startswith("#/"):
        raise LookupError(reference)
    found = root
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal():
            found = found[int(name)]
        elif isinstance(found, dict):
            found = found[name]
        else:
            raise LookupError(reference)
    return found
