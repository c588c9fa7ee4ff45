"""Matrix products with weights: torch on a GPU; our kernels or oneDNN on a CPU.

CPU weights are packed once, in the order in which the kernels read them: in panels
(`panel_linear.py`), or in oneDNN's layout if the CPU has AMX. `linear` dispatches on the weight's
type. `quantization="int8"` stores int8 weights with a scale per output channel, and quantizes
activations dynamically with a scale per token (W8A8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .panel_linear import (
    ZERO,
    PanelWeight,
    pack_panels,
    panel_linear,
    quantize_panels,
    serves_panels,
)

# Rows per packed product. Measured at 128 and 512 rows on AMX and AVX512-BF16: weights packed for
# 128 rows are as fast as plain ones in calls of 128 rows; in larger calls, AMX loses a quarter.
PACKED_ROWS = 128
INT8_ROWS = 512  # per int8 product: on AMX, calls of 128 rows are 1.2 to 1.5 times slower
TILE_ROWS = 16  # of an AMX tile: fewer rows take the same time
HALVES = (torch.bfloat16, torch.float16)
QUANTIZE_ROWS = 256  # rows per pass, which limits the size of the float32 copy


@dataclass(frozen=True)
class PackedWeight:
    """Weight [out, in], bfloat16 in oneDNN's layout."""

    packed: torch.Tensor  # opaque
    nbytes: int


@dataclass(frozen=True)
class Int8Weight:
    """Weight [out, in], int8 in oneDNN's layout; row i is multiplied by scale[i]."""

    packed: torch.Tensor  # opaque
    scale: torch.Tensor  # float32 [out]
    zeros: torch.Tensor  # int32 [out], all 0
    nbytes: int


Weight = torch.Tensor | PackedWeight | Int8Weight | PanelWeight


def pack_weight(weight: torch.Tensor, quantization: str | None = None) -> Weight:
    """Return `weight` [out, in] in the fastest layout for its device.

    quantization: None or, on a CPU, "int8". GPU weights are returned unchanged.
    """
    if weight.device.type != "cpu":
        return weight
    if serves_panels(weight):
        return quantize_panels(weight) if quantization == "int8" else pack_panels(weight)
    if quantization == "int8":
        return _quantize(weight)
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return PackedWeight(packed, weight.nbytes)
    return weight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [n, in] × weightᵀ + bias, [n, out] in x's dtype.

    weight: [out, in], from `pack_weight`. bias: [out] or None.
    """
    if isinstance(weight, PanelWeight):
        return panel_linear(x, weight, bias)
    if isinstance(weight, PackedWeight):
        return _packed_linear(x, weight, bias)
    if isinstance(weight, Int8Weight):
        return _int8_linear(x, weight, bias)
    if x.device.type == "cpu" and x.dtype in HALVES:
        return in_few_shapes(lambda rows: torch.nn.functional.linear(rows, weight, bias), x)
    return torch.nn.functional.linear(x, weight, bias)


def padded_rows(num_rows: int) -> int:
    """Return the row count, one of twelve, that 1 to PACKED_ROWS rows are padded to."""
    if 0 < num_rows < TILE_ROWS:
        return 1 << (num_rows - 1).bit_length()
    return -(-num_rows // TILE_ROWS) * TILE_ROWS


def in_few_shapes(
    product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, piece: int = PACKED_ROWS
) -> torch.Tensor:
    """Return `product` of x [n, in]; on a CPU, compute it in pieces of few distinct row counts.

    Pieces have `piece` rows as long as they fit, then at most PACKED_ROWS, padded by `padded_rows`.
    oneDNN compiles code for each row count of each weight shape. That takes a millisecond, and the
    0.3 to 0.6 MB of code are cached. With all row counts, a worker grew by hundreds of MB over
    hours.
    """

    def padded(rows: torch.Tensor) -> torch.Tensor:
        missing = padded_rows(len(rows)) - len(rows)
        if not missing:
            return product(rows)
        return product(torch.nn.functional.pad(rows, (0, 0, 0, missing)))[: len(rows)]

    if x.device.type != "cpu":
        return product(x)
    whole = len(x) // piece * piece
    if not whole:
        return by_rows(padded, x)
    parts = [product(rows) for rows in x[:whole].split(piece)]
    return torch.cat([*parts, by_rows(padded, x[whole:])] if whole < len(x) else parts)


def by_rows(layers: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return `layers` of x [n, ...]; on a CPU, compute PACKED_ROWS rows at a time.

    Intermediate results then stay in the CPU cache.
    """
    if x.device.type != "cpu" or len(x) <= PACKED_ROWS:
        return layers(x)
    return torch.cat([layers(rows) for rows in x.split(PACKED_ROWS)])


def _packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    def product(rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, weight.packed, bias, "none", [], "")

    return in_few_shapes(product, x)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [n, in] to int8 in [-127, 127]; return it with scales float32 [n]."""
    scale = x.abs().amax(1).float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (x.float() * (1 / scale)[:, None]).round_().to(torch.int8), scale


def _quantize(weight: torch.Tensor) -> Int8Weight:
    parts = [quantize_rows(rows) for rows in weight.split(QUANTIZE_ROWS)]
    numbers, scale = (torch.cat(each) for each in zip(*parts, strict=True))
    packed = torch.ops.onednn.qlinear_prepack(numbers, [PACKED_ROWS, weight.shape[1]])
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return Int8Weight(packed, scale, zeros, numbers.nbytes + scale.nbytes + zeros.nbytes)


def _int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32

    def product(rows: torch.Tensor) -> torch.Tensor:
        numbers, scale = quantize_rows(rows)
        unsigned = numbers.view(torch.uint8) ^ ZERO  # adds ZERO
        out = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, ZERO, weight.packed, weight.scale, weight.zeros, None, 1.0, 0, dtype,
            "none", [], "",
        )  # fmt: skip
        out = out.mul_(scale[:, None]).to(x.dtype)
        return out if bias is None else out.add_(bias)

    return in_few_shapes(product, x, INT8_ROWS)


def linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute x [n, in] × weight [out, in]ᵀ + bias in float64 (test oracle), in x's dtype."""
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)


def int8_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the int8 product in float64, with x and weight both quantized (test oracle).

    x: [n, in]. weight: [out, in]. Returns [n, out] in x's dtype.
    """
    parts = [quantize_rows(rows) for rows in (x, weight)]
    wide = [numbers.double() * scale.double()[:, None] for numbers, scale in parts]
    return linear_ref(wide[0], wide[1], bias).to(x.dtype)
