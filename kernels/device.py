"""Where a kernel runs."""

from __future__ import annotations

import torch
import triton


def uses_triton(x: torch.Tensor) -> bool:
    """True on a GPU, and in Triton's interpreter, which tests run on the CPU."""
    return x.is_cuda or triton.knobs.runtime.interpret
