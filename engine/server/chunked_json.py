"""JSON written in pieces: a large response is never held whole, nor made in one go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

PIECE_BYTES = 32 << 10  # about a millisecond of work
# JSON escapes all other line separators by itself: they are control characters below U+0020.
LINE_SEPARATORS = (("\u0085", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))


class LazyList:
    """A list of JSON values that are made when they are written. `make`: called each time."""

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


def dump(value: Any) -> bytes:
    """Write a small value in one go."""
    return _text(value).encode()


def json_pieces(value: Any) -> Iterator[bytes]:
    """Yield the same bytes as `dump`, in pieces of about `PIECE_BYTES`."""
    held: list[str] = []
    size = 0
    for text in _parts(value):
        held.append(text)
        size += len(text)
        if size >= PIECE_BYTES:
            yield "".join(held).encode()
            held, size = [], 0
    yield "".join(held).encode()


def _parts(value: Any) -> Iterator[str]:
    """Yield a value's JSON: containers by their items, the items of lazy lists whole."""
    if isinstance(value, dict):
        start = "{"
        for name, each in value.items():
            yield f"{start}{_text(name)}:"
            yield from _parts(each)
            start = ","
        yield "}" if value else "{}"
    elif isinstance(value, list | LazyList):
        start = "["
        for each in value:
            yield start
            yield from [_text(each)] if isinstance(value, LazyList) else _parts(each)
            start = ","
        yield "]" if start == "," else "[]"
    else:
        yield _text(value)


def _text(value: Any) -> str:
    """Return JSON on one line, also for clients that split lines at Unicode's line separators, as
    Python's `splitlines` does."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_as_list)
    for character, escaped in LINE_SEPARATORS:
        text = text.replace(character, escaped)  # it can only be inside a string
    return text


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, LazyList):
        return list(value)
    raise TypeError(type(value).__name__)


class Turns:
    """Lets one large response make a piece at a time, and everything else run in between."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def paced(self, pieces: Iterator[Any]) -> AsyncIterator[Any]:
        """Yield the pieces; the next is made once the last was taken and it is this one's turn."""
        end = object()
        while True:
            async with self._lock:
                piece = next(pieces, end)
                await asyncio.sleep(0)
            if piece is end:
                return
            yield piece
