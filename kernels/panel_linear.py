"""CPU matrix products with weights packed in panels of 16 output columns.

Used on CPUs with AVX512-BF16 and without AMX, where they read memory faster than oneDNN for few
rows (measured on two cores of an AMD EPYC 9004, 2B shape: 1.6 times at 1 row, 1.13 at 16, 1.03 at
128).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import native

ZERO = 128  # zero point of activations: the CPU multiplies uint8 by int8


@dataclass(frozen=True)
class PanelWeight:
    """Weight [out, in] in bfloat16 or, with scales, in int8."""

    panels: torch.Tensor  # int32 [ceil(out / 16), words, 16]; a word has 2 or 4 values of a row
    out_size: int
    scale: torch.Tensor | None = None  # float32 [out]
    zero: torch.Tensor | None = None  # int32 [out]: ZERO × the sum of each row

    @property
    def in_size(self) -> int:
        return self.panels.shape[1] * (2 if self.scale is None else 4)

    @property
    def nbytes(self) -> int:
        held = (self.panels, self.scale, self.zero)
        return sum(each.nbytes for each in held if each is not None)


def serves_panels(weight: torch.Tensor) -> bool:
    """Return whether panels are the fastest layout for `weight` [out, in] on this machine."""
    fits = weight.dim() == 2 and weight.shape[1] % 4 == 0
    return fits and native.serves(weight) and not native.has_amx()


def pack_panels(weight: torch.Tensor) -> PanelWeight:
    """Pack `weight`, bfloat16 [out, in]."""
    return PanelWeight(_panels(weight.contiguous()), len(weight))


def quantize_panels(weight: torch.Tensor) -> PanelWeight:
    """Quantize `weight`, bfloat16 [out, in], to int8 with a scale per row, and pack it."""
    weight = weight.contiguous()
    numbers, scale = (
        torch.empty(weight.shape, dtype=torch.uint8),
        torch.empty(len(weight), dtype=torch.float32),
    )
    native.call("octavo_quantize_rows", weight, numbers, scale, *weight.shape)
    signed = (numbers ^ ZERO).view(torch.int8)
    zero = signed.sum(dim=1, dtype=torch.int32) * ZERO
    return PanelWeight(_panels(signed), len(weight), scale, zero)


def _panels(rows: torch.Tensor) -> torch.Tensor:
    n, words = rows.shape[0], rows.shape[1] * rows.itemsize // 4
    panels = torch.empty((-(-n // 16), words, 16), dtype=torch.int32)
    native.call("octavo_pack_panels", rows, panels, n, words)
    return panels


def panel_linear(
    x: torch.Tensor, weight: PanelWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x × weightᵀ + bias.

    x is bfloat16 [n, in], bias [out] or None; the result is bfloat16 [n, out]. With int8 weights,
    activations are quantized dynamically with a scale per row.
    """
    out = x.new_empty(len(x), weight.out_size)
    sizes = (len(x), weight.out_size, weight.panels.shape[1])
    if weight.scale is None:
        native.call("octavo_linear", x.contiguous(), weight.panels, bias, out, *sizes)
        return out
    numbers = torch.empty(x.shape, dtype=torch.uint8)
    into = (out, numbers, torch.empty(len(x), dtype=torch.float32))
    scales = (weight.scale, weight.zero)
    native.call("octavo_linear_int8", x.contiguous(), weight.panels, bias, *scales, *into, *sizes)
    return out
