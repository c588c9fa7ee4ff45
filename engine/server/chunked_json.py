"""Incremental JSON encoding: a large response is never in memory as a whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

PIECE_BYTES = 32 << 10  # about a millisecond of work
# JSON escapes all other line separators by itself: they are control characters below U+0020.
LINE_SEPARATORS = (("\u0085", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))


class LazyList:
    """A list of JSON values that are created while they are written, by calling `make`."""

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


def dump(value: Any) -> bytes:
    """Encode a small value."""
    return _text(value).encode()


def json_pieces(value: Any) -> Iterator[bytes]:
    """Yield the bytes of `dump` in chunks of about `PIECE_BYTES`."""
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
    """Yield a value's JSON, item by item for containers. Items of lazy lists are not split."""
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
    """Return JSON without line separators.

    Some clients split lines at Unicode's line separators too, as Python's `splitlines` does.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_as_list)
    for character, escaped in LINE_SEPARATORS:
        text = text.replace(character, escaped)  # occurs only inside strings
    return text


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, LazyList):
        return list(value)
    raise TypeError(type(value).__name__)


class Turns:
    """Serializes the encoding of large responses, one chunk at a time, so the loop stays free."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def paced(self, pieces: Iterator[Any]) -> AsyncIterator[Any]:
        """Yield the chunks; each is created on demand, while no other response creates one."""
        end = object()
        while True:
            async with self._lock:
                piece = next(pieces, end)
                await asyncio.sleep(0)
            if piece is end:
                return
            yield piece
