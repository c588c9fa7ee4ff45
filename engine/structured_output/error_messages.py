"""Maps llguidance's errors to our messages.

Of the library's text only two things go out: positions (line, column), and names that the client
wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ...scheduler.params import truncated_repr

MAX_NAMES = 8

_UNSUPPORTED = "cannot be kept to here; leave it out"
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
TOO_COMPLEX = "is too complex to be followed; simplify it, or split it"
TOO_SLOW = "is too complex: it takes over a second to compile; simplify it, or split it"
TOO_LARGE = "is too complex: compiled, it takes over 32 MiB; simplify it, or split it"
UNUSABLE = "is not a supported grammar"


def reason_of(text: str, field: str) -> str:
    """`text`: what llguidance says of the form in `field`."""
    place = ""
    if field == "lark" and (found := re.search(r"(?:^|\s)(\d+)\((\d+)\)", text)):
        place = f"at line {found[1]}, column {found[2]}: "
    return place + _reason(text, field)


def _reason(text: str, field: str) -> str:
    is_regex = "regex parse error" in text
    said = text.partition("\nerror:")[2].partition("\n")[0] if is_regex else text  # no pattern
    for pattern, told in _KNOWN:
        if found := re.search(pattern, said, re.DOTALL):
            return told(found)
    if any(part in said for part in _COMPLEX):
        return TOO_COMPLEX
    if is_regex or "invalid regex" in text:
        return "a pattern in it is no regular expression" if field != "regex" else _regex(text)
    if field == "lark":
        return "is not Lark's grammar from there on"
    return UNUSABLE


def _regex(text: str) -> str:
    """With the place, which the library marks under the pattern's line."""
    lines = text.partition("\nerror:")[0].split("\n")
    marked = lines[-1]
    if len(lines) != 3 or not marked.startswith("    ") or "^" not in marked:
        return "is no regular expression"
    return f"is no regular expression: see character {marked.index('^') - 3}"


def _names(found: re.Match[str]) -> str:
    try:
        names = [str(name) for name in json.loads(found[1])]
    except ValueError:
        return f"has a keyword that {_UNSUPPORTED}"
    told = ", ".join(truncated_repr(name) for name in sorted(names)[:MAX_NAMES])
    return f"{told}: {_UNSUPPORTED}"


def _says(text: str) -> Callable[[re.Match[str]], str]:
    return lambda found: text


def _quotes(before: str, after: str) -> Callable[[re.Match[str]], str]:
    """With what the caller wrote between the two."""
    return lambda found: f"{before}{truncated_repr(found[1].strip())}{after}"


_KNOWN: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"Unimplemented keys: (\[.*?\])", _names),
    (r"oneOf constraints are not supported", _says(f"'oneOf': {_UNSUPPORTED}, or use anyOf")),
    (r"Invalid type: ([^\n]*)", _quotes("type ", " is none of JSON's")),
    (r"Unknown format: ([^\n]*)", _quotes("format ", f" {_UNSUPPORTED}")),
    (r"Unsatisfiable schema|Schema is unsatisfiable", _says("contradicts itself: no value has it")),
    (r"Pointer '([^']*)' does not exist", _quotes("$ref to ", " leads nowhere")),
    (r"Resource '([^']*)' is not present", _quotes("$ref to ", ": only '#/...' is followed")),
    (r"recursion limit", _says("is nested too deep")),
    (r"look-around", _says("look-around is not supported")),
    (r"backreference", _says("back-references are not supported")),
    (r"unknown name: \"([^\"]*)\"", _quotes("", " is not defined")),
    (r"no start rule found", _says("has no rule named start: that is where it begins")),
    (r"NoExtension", _says("matches nothing")),
)
