"""M-RoPE positions of a prompt, computed from explicit media spans, not from token ids.

Text advances all three axes together. The tokens of an image or video have offsets (time, row,
column) from its start; the next token starts at the maximum over all axes + 1. Source: the
Qwen2-VL paper, section 2.1.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from ...scheduler.request import MediaSpan


def mrope_positions(
    num_tokens: int, spans: Sequence[MediaSpan], merge_size: int
) -> tuple[tuple[array[int], ...], int]:
    """Return positions [3][num_tokens], and delta: output token i has position i + delta."""
    positions = np.empty((3, num_tokens), np.int32)
    at = done = 0  # next position, next token
    for span in spans:
        text = span.offset - done
        positions[:, done : span.offset] = np.arange(at, at + text)
        at += text
        frames, height, width = span.grid_thw
        sizes = (frames, height // merge_size, width // merge_size)
        end = span.offset + span.num_tokens
        positions[:, span.offset : end] = np.indices(sizes).reshape(3, -1) + at
        at, done = at + max(sizes), end
    positions[:, done:] = np.arange(at, at + num_tokens - done)
    last = at + num_tokens - done
    return tuple(array("i", axis.tobytes()) for axis in positions), last - num_tokens
