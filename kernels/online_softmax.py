"""Online softmax of the attention kernels. Source: FlashAttention-2 (Dao, 2023)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # scores are multiplied by this, since kernels use exp2


@triton.jit
def fold(scores, top, total):
    """Update the rows' running maxima `top` and sums `total` [m] with scores [m, n] (base 2).

    Returns (weights, factor that rescales earlier sums, new maxima, new sums).
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    return weights, fade, new_top, total * fade + tl.sum(weights, 1)
