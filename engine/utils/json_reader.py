"""Parse JSON without holding the GIL for long.

`json.loads` holds the GIL for the whole call: 0.2 s for 64 MB of text, seconds for millions of
keys. It parses small inputs. Larger ones are parsed here in steps, between which other threads can
run: long strings, lists of numbers and small objects by `json.loads` in parts of at most 1 MB, the
rest in Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

SMALL = 1 << 17  # bytes that `json.loads` always parses in under 30 ms
MAX_ITEMS = 200_000  # values and keys, except numbers in lists
MAX_NUMBERS = 4_000_000  # in lists
MAX_DEPTH = 200
PART = 1 << 20  # bytes of a string

_SPACE = re.compile(rb"[ \t\n\r]{0,65536}")
# Part of a string that does not split an escape or a surrogate pair.
_PART = re.compile(
    rb'(?:[^"\\]{1,64}|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\[^u]){1,16384}[\x80-\xbf]{0,3}',
    re.S,
)
_NUMBERS = re.compile(rb"(?:[-+.eE0-9]{1,32}[ \t\n\r]{0,64},[ \t\n\r]{0,64}){1,4096}")
_SCALAR = re.compile(rb"[-+.0-9a-zA-Z]{1,400}")
_FLAT = re.compile(rb'\{[^][{}"]{0,64}(?:"(?:[^"\\]|\\.){0,1000}"[^][{}"]{0,64}){0,64}\}', re.S)


class TooManyParts(ValueError):
    """The JSON has more than `MAX_ITEMS` values or `MAX_NUMBERS` numbers."""


def read_json(data: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError for invalid JSON, or `TooManyParts`."""
    if len(data) <= SMALL:
        try:
            return _loads(data)
        except RecursionError:
            raise ValueError("is nested too deeply") from None
    return _Reader(data).read()


def _loads(data: bytes) -> Any:
    return json.loads(data, parse_constant=_reject_constant)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._num_items = self._num_numbers = 0
        self._stops = {b'"': -1, b"\\": -1}  # the next position of each, or where to look again

    def read(self) -> Any:
        self._at = 3 if self._data.startswith(b"\xef\xbb\xbf") else 0
        found = self._value(0)
        if self._next():
            raise ValueError("has extra data after its end")
        return found

    def _value(self, depth: int) -> Any:
        self._count()
        first = self._next()
        if first == b'"':
            return self._string()
        if first == b"{":
            if flat := _FLAT.match(self._data, self._at):  # fast path for small objects
                self._at = flat.end()
                self._count(flat[0].count(b":"))
                return _loads(flat[0])
            return self._collect({}, self._member, b"}", depth + 1)
        if first == b"[":
            return self._collect([], self._element, b"]", depth + 1)
        found = _SCALAR.match(self._data, self._at)
        if found is None:
            raise ValueError("lacks a value")
        self._at = found.end()
        return _loads(found[0])

    def _collect(
        self, found: Any, read_one: Callable[[Any, int], None], end: bytes, depth: int
    ) -> Any:
        """Read an object or a list up to its closing bracket."""
        if depth > MAX_DEPTH:
            raise ValueError("is nested too deeply")
        self._at += 1
        if self._next() == end:
            self._at += 1
            return found
        while True:
            read_one(found, depth)
            mark = self._next()
            self._at += 1
            if mark == end:
                return found
            if mark != b",":
                raise ValueError("lacks a comma")

    def _member(self, found: dict[str, Any], depth: int) -> None:
        self._count()
        if self._next() != b'"':
            raise ValueError("lacks a key")
        key = self._string()
        if self._next() != b":":
            raise ValueError("lacks a colon")
        self._at += 1
        found[key] = self._value(depth)

    def _element(self, found: list[Any], depth: int) -> None:
        self._next()
        while numbers := _NUMBERS.match(self._data, self._at):
            self._at = numbers.end()
            found += _loads(b"[" + numbers[0].rstrip(b", \t\n\r") + b"]")
            self._num_numbers += numbers[0].count(b",")
            if self._num_numbers > MAX_NUMBERS:
                raise TooManyParts(f"over {MAX_NUMBERS} numbers")
            self._next()
        found.append(self._value(depth))

    def _string(self) -> str:
        """Read a string from its opening quote."""
        self._at += 1
        parts = []
        while part := self._part():
            parts.append(_loads(b'"%b"' % part))
            self._at += len(part)
        if self._data[self._at : self._at + 1] != b'"':
            raise ValueError("has an unterminated string")
        self._at += 1
        return "".join(parts)

    def _part(self) -> bytes:
        """Return the next part of a string, b"" at its end."""
        end = min(self._next_stop(b'"'), self._next_stop(b"\\"))
        while end < len(self._data) and 0x80 <= self._data[end] < 0xC0:
            end += 1  # Do not split a UTF-8 sequence.
        if end > self._at:
            return self._data[self._at : end]
        escapes = _PART.match(self._data, self._at)
        return escapes[0] if escapes else b""

    def _next_stop(self, stop: bytes) -> int:
        """Return the position at which this byte ends the current part.

        Positions are cached: there may be millions of backslashes between two quotes.
        """
        if self._stops[stop] <= self._at:
            end = min(len(self._data), self._at + PART)
            found = self._data.find(stop, self._at, end)
            self._stops[stop] = end if found < 0 else found
        return self._stops[stop]

    def _next(self) -> bytes:
        """Skip white space and return the byte that follows, b"" at the end."""
        while self._data[self._at : self._at + 1] in (b" ", b"\n", b"\t", b"\r"):
            found = _SPACE.match(self._data, self._at)
            self._at = found.end() if found else self._at
        return self._data[self._at : self._at + 1]

    def _count(self, count: int = 1) -> None:
        self._num_items += count
        if self._num_items > MAX_ITEMS:
            raise TooManyParts(f"over {MAX_ITEMS} values and keys")
