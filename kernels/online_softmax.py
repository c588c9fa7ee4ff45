"""The running softmax of an attention kernel. Source: FlashAttention-2 (Dao, 2023)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # kernels take powers of two: scores come times this


@triton.jit
def fold(scores, top, total):
    """Takes scores [m, n], in powers of two, into the rows' maxima and sums [m].

    Returns their weights, what earlier sums fade by, and the new maxima and sums.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    return weights, fade, new_top, total * fade + tl.sum(weights, 1)
