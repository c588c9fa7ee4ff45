"""Calls of llguidance shared by the engine and the trial process. Cheap to import."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

# llguidance's own limits, at a tenth to a half of their defaults.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 30_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
WORD = 32  # bits per word of a mask
MASK_WORD_BYTES = 4


def load_tokenizer(text: str, vocab_size: int, end_token_ids: Sequence[int]) -> Any:
    """Return an `LLTokenizer` for a `tokenizer.json`. Raises ValueError if unsupported."""
    import llguidance

    return llguidance.LLTokenizer(text, vocab_size, list(end_token_ids))


def new_matcher(tokenizer: Any, text: str) -> Any:
    """Compile a grammar. Most errors are reported by `is_error` of the result, some raised."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS)
    return llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)


def mask_words(tokenizer: Any) -> int:
    return -(-int(tokenizer.vocab_size) // WORD)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def heap_bytes() -> int:
    """Return the bytes that this process has allocated on the C heap.

    Without mallinfo2 in the C library, return the resident set size.
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return _statm(1)
    mallinfo.restype = _Mallinfo2
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def address_space_bytes() -> int:
    return _statm(0)


def _statm(index: int) -> int:
    import mmap

    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[index]) * mmap.PAGESIZE
