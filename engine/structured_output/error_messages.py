"""Map llguidance errors to our messages.

Only positions (line, column) and names from the client's grammar are taken from the library's
text; the rest is not exposed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ...scheduler.params import truncated_repr
from ...scheduler.structured import StructuredOutput
from .subschemas import is_number, subschemas

MAX_NAMES = 8
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LARGE_COUNT = 1000

_UNSUPPORTED = "not supported; remove it"
_COMPLEX = (
    "fuel",
    "too many",
    "too large",
    "too big",
    "too complex",
    "precomputation",
    "exceeds",
    "max is",
    "Unable to determine",
    "size limit",
    "nest limit",
)
TOO_COMPLEX = "is too complex; simplify it, or split it"
TOO_SLOW = "is too complex: it takes over a second to compile; simplify it, or split it"
TOO_LARGE = "is too complex: compiled, it takes over 32 MiB; simplify it, or split it"
UNUSABLE = "is not a supported grammar"


def reason_of(text: str, field: str) -> str:
    """Convert llguidance's error text about a grammar in `field` to our message."""
    position = ""
    if field == "lark" and (found := re.search(r"(?:^|\s)(\d+)\((\d+)\)", text)):
        position = f"at line {found[1]}, column {found[2]}: "
    return position + _reason(text, field)


def with_largest_count(form: StructuredOutput, reason: str) -> str:
    """Add the largest count of a schema to the error that it is too complex."""
    if reason not in (TOO_COMPLEX, TOO_SLOW, TOO_LARGE) or form.json_schema is None:
        return reason
    counts = [
        (node[key], key)
        for node in subschemas(json.loads(str(form.json_schema)))
        for key in COUNTS
        if is_number(node.get(key))
    ]
    count, key = max(counts, default=(0, ""))
    if count < LARGE_COUNT:
        return reason
    return f"{reason}; {key}: {truncated_repr(count)} may be the cause"


def _reason(text: str, field: str) -> str:
    if quoted := re.search(r"regex parse error:\n    ([^\n]*)\n", text):
        # Without the client's pattern, which could match by accident.
        message = text.partition("\nerror:")[2].partition("\n")[0]
        pattern = truncated_repr(quoted[1]) if field == "json_schema" else ""
    else:
        message, pattern = text, ""
    for known, convert in _KNOWN:
        if found := re.search(known, message, re.DOTALL):
            return f"pattern {pattern}: {convert(found)}" if pattern else convert(found)
    if any(part in message for part in _COMPLEX):
        return TOO_COMPLEX
    if pattern:
        return f"pattern {pattern}: invalid regular expression"
    if quoted or "invalid regex" in text:
        return "has an invalid regular expression" if field != "regex" else _regex(text)
    if field == "lark":
        return "is not a valid Lark grammar from this position on"
    return UNUSABLE


def _regex(text: str) -> str:
    """Return the error with its position, which the library marks below the pattern."""
    lines = text.partition("\nerror:")[0].split("\n")
    marked = lines[-1]
    if len(lines) != 3 or not marked.startswith("    ") or "^" not in marked:
        return "is not a valid regular expression"
    return f"is not a valid regular expression: see character {marked.index('^') - 3}"


def _names(found: re.Match[str]) -> str:
    try:
        names = [str(name) for name in json.loads(found[1])]
    except ValueError:
        return f"has a keyword that is {_UNSUPPORTED}"
    listed = ", ".join(truncated_repr(name) for name in sorted(names)[:MAX_NAMES])
    return f"{listed}: {_UNSUPPORTED}"


def _says(text: str) -> Callable[[re.Match[str]], str]:
    return lambda found: text


def _quotes(before: str, after: str) -> Callable[[re.Match[str]], str]:
    """Return a function that quotes the matched client text between the two."""
    return lambda found: f"{before}{truncated_repr(found[1].strip())}{after}"


def _overlap(found: re.Match[str]) -> str:
    first, second = truncated_repr(found[1]), truncated_repr(found[2])
    return f"patternProperties {first} and {second}: a name may match both; make them disjoint"


def _wrong_value(found: re.Match[str]) -> str:
    kind = "non-negative integer of 64 bits" if " " in found[1] else found[1]
    return f"{found[2]}: {truncated_repr(found[3])}: must be of type {kind}"


def _assertion(found: re.Match[str]) -> str:
    names = {"Word": r"\b or \B", "Start": "'^' after the start", "End": "'$' before the end"}
    return f"pattern {truncated_repr(found[2])}: {names[found[1]]} is {_UNSUPPORTED}"


_KNOWN: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"Unimplemented keys: (\[.*?\])", _names),
    (r"oneOf constraints are not supported", _says(f"'oneOf' is {_UNSUPPORTED}, or use anyOf")),
    (r"Invalid type: ([^\n]*)", _quotes("type ", " is not a JSON type")),
    (r"Unknown format: ([^\n]*)", _quotes("format ", f" is {_UNSUPPORTED}")),
    (r"Unsatisfiable schema|Schema is unsatisfiable", _says("is unsatisfiable: no value matches")),
    (r"Pointer '([^']*)' does not exist", _quotes("$ref to ", " does not exist")),
    (r"Resource '([^']*)' is not present", _quotes("$ref to ", ": only '#/...' is supported")),
    (r"recursion limit", _says("is nested too deeply")),
    (r"patternProperty regexes /(.*)/ and /(.*)/ are not disjoint", _overlap),
    (r"Expected (positive integer|\w+) for '(\w+)', got ([^\n]*)", _wrong_value),
    (r"lookarounds not supported yet; (Start|End|Word)\w* in regex /([^\n]*)/", _assertion),
    (r"look-around", _says("look-around is not supported; remove it")),
    (r"backreference", _says("back-references are not supported; remove them")),
    (r"unknown name: \"([^\"]*)\"", _quotes("", " is not defined")),
    (r"no start rule found", _says("has no rule named start; add one")),
    (r"NoExtension", _says("matches nothing")),
)
