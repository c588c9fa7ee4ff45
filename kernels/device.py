"""Kernel dispatch by device."""

from __future__ import annotations

import torch
import triton


def uses_triton(x: torch.Tensor) -> bool:
    """Return whether Triton kernels run on `x`: on a GPU, or in Triton's CPU interpreter."""
    return x.is_cuda or triton.knobs.runtime.interpret
