"""SwiGLU and quick GELU.

Sources: `Qwen2MLP` and `QuickGELUActivation` of transformers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import native
from .device import uses_triton

SETTINGS = {"BLOCK_SIZE": 1024, "num_warps": 4}


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + offs, mask=mask, other=0.0)
    activated = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out_ptr + row * SIZE + offs, activated * up, mask=mask)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) × up, [n, size], of gate_up [n, 2 × size] (gate first)."""
    if native.serves(gate_up):
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        native.call("octavo_swiglu", gate_up, out, rows, size)
        return out
    if not uses_triton(gate_up):
        return swiglu_ref(gate_up)
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    grid = (rows, triton.cdiv(size, SETTINGS["BLOCK_SIZE"]))
    _swiglu_kernel[grid](gate_up, out, SIZE=size, **SETTINGS)
    return out


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x × sigmoid(1.702 x). The compiled CPU kernel works in place and returns x."""
    if not native.serves(x) or not x.is_contiguous():
        return quick_gelu_ref(x)
    native.call("octavo_quick_gelu", x, x.numel())
    return x


def quick_gelu_ref(x: torch.Tensor) -> torch.Tensor:
    """Compute `quick_gelu` in plain torch (test oracle), for x of any shape."""
    return x * torch.sigmoid(1.702 * x)


def swiglu_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute `swiglu` in plain torch (test oracle): [n, 2 × size] to [n, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
