"""Split text into pieces that encode to the same token ids as the whole text.

Encoding runs in native code that cannot be interrupted. Pieces bound its time and memory, and a
request that ends or exceeds its context stops at the next piece.

A cut is safe if three conditions hold for any surrounding text. Both neighbours keep their
character class under NFC and do not combine across the cut. The pre-tokenizer of Qwen's models
(`PATTERN`) always ends a match there. Its match before the cut does not depend on the text after
it: only `\\s+(?!\\S)` looks ahead, and no cut directly follows white space except after a line
break, where `\\s*[\\r\\n]+` has matched first.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any
from unicodedata import ucd_3_2_0 as oldest_data

from ..errors import InputError

PIECE = 1 << 12  # characters: about 5 ms of native code, at most 25 ms
MAX_RUN = 1 << 17  # UTF-8 bytes without a safe cut: takes under a second and 45 MB

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def can_cut(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether `is_cut` is valid for a `tokenizer.json`.

    Its normalizer must be NFC or none, and its pre-tokenizer `PATTERN`.
    """
    normalizer = tokenizer.get("normalizer")
    steps: list[Any] = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if normalizer not in (None, {"type": "NFC"}) or len(steps) != 2:
        return False
    split, to_bytes = steps
    return (
        split.get("type") == "Split"
        and split.get("pattern") == {"Regex": PATTERN}
        and split.get("behavior") == "Isolated"
        and split.get("invert") is False
        and to_bytes.get("type") == "ByteLevel"
        and to_bytes.get("add_prefix_space") is False
        and to_bytes.get("use_regex") is False
    )


@functools.lru_cache(1 << 12)
def kind_of(character: str) -> str:
    """Return the first letter of the Unicode category, or "" if libraries may disagree.

    Libraries agree on characters whose category has not changed since Unicode 3.2, the oldest data
    in Python.
    """
    kind = unicodedata.category(character)[0]
    return kind if oldest_data.category(character)[0] == kind else ""


def _starts(character: str) -> bool:
    """Return whether NFC never combines the character with one before it."""
    if kind_of(character) == "L":
        return character <= "\uffff" and not "\u1100" <= character <= "\u11ff"  # Hangul jamo
    return character < "\x80" or kind_of(character) in ("N", "P", "S", "Z")


def is_cut(text: str, at: int) -> bool:
    """Return whether encoding text[:at] and text[at:] always gives the ids of the whole text."""
    last, first = text[at - 1], text[at]
    if first in " \t":
        return not last.isspace()
    if not _starts(first):
        return False
    kind = kind_of(last)
    if kind == "N":
        return True
    if last == "\n":
        return kind_of(first) in ("L", "N", "P", "S")
    ends_word = kind_of(first) in ("N", "P", "S", "Z") or first in "\r\n"
    return kind == "L" and ends_word and unicodedata.is_normalized("NFC", last)


def pieces(text: str, cuts: bool, field: str) -> Iterator[str]:
    """Yield the text in pieces of about `PIECE` characters.

    `cuts`: whether `is_cut` is valid for the tokenizer; otherwise the text is one piece. Raises
    `InputError` if more than `MAX_RUN` bytes have no safe cut.
    """
    start = 0
    while start < len(text):
        end = _end_of_piece(text, start, cuts)
        piece = text[start:end]
        if len(piece) > PIECE and len(piece.encode("utf-8", "surrogatepass")) > MAX_RUN:
            raise InputError(field, _too_long(text, cuts))
        yield piece
        start = end


def _too_long(text: str, cuts: bool) -> str:
    if cuts:
        return (
            f"has over {MAX_RUN} bytes without a space, digit or line break, at which the "
            "tokenizer could split it; insert spaces or line breaks"
        )
    return (
        f"has a text of {len(text.encode('utf-8', 'surrogatepass'))} bytes; the maximum is "
        f"{MAX_RUN}, since this checkpoint's tokenizer cannot encode a text in parts; shorten it"
    )


def _end_of_piece(text: str, start: int, cuts: bool) -> int:
    """Return the last safe cut within `PIECE` characters, or the first one after them."""
    target = start + PIECE
    if target >= len(text):
        return len(text)
    last = min(len(text), start + MAX_RUN + 1)  # one over the limit, so that `pieces` rejects it
    if not cuts:
        return last
    for at in range(target, start, -1):
        if is_cut(text, at):
            return at
    return next((at for at in range(target + 1, last) if is_cut(text, at)), last)
