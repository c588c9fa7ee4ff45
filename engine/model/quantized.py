"""Weights of the decoder's linear layers from quantized checkpoints.

On a GPU they stay quantized, in the layout of the Triton kernels. On a CPU they are dequantized to
the model's dtype after a layer's last part is loaded, and are then treated as dense weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ...kernels.device import uses_triton
from ...kernels.fp8_linear import FP8, fp8_linear
from ...kernels.int4_layout import (
    BLOCK,
    Int4Groups,
    PackedInt4,
    pack_int4,
    unpack_awq,
    unpack_gptq,
)
from ...kernels.int4_linear import int4_linear
from ...kernels.linear import Weight, linear, pack_weight
from ..config.quantization import WeightFormat
from .weights import ALL, DenseWeight, WeightLoader, empty

WORD = 8  # 4-bit values per int32
SLAB = 4 * BLOCK  # inputs or outputs unpacked at a time, which limits the size of the wider copy


def make_weight(
    stored: WeightFormat | None, out_size: int, in_size: int, bias: bool = False
) -> LinearWeight:
    """Return the weight module of a decoder layer for the checkpoint's format."""
    if stored is None:
        return DenseWeight(out_size, in_size, bias)
    if stored.bits == 4:
        return Int4Weight(stored, out_size, in_size, bias)
    return Fp8Weight(stored, out_size, in_size, bias)


def _kept(weight: Weight) -> Weight | nn.Parameter:
    return nn.Parameter(weight, False) if isinstance(weight, torch.Tensor) else weight


class Int4Weight(nn.Module):
    """4-bit weight [in, out] in groups of inputs (AWQ or GPTQ), and bias [out]."""

    weight: Weight | PackedInt4  # set by `finish`

    def __init__(self, stored: WeightFormat, out_size: int, in_size: int, bias: bool) -> None:
        super().__init__()
        self.stored, self.in_size, self.out_size = stored, in_size, out_size
        self.dtype = torch.get_default_dtype()
        groups = in_size // stored.group_size
        rows, columns = (WORD, 1) if stored.method == "gptq" else (1, WORD)
        self.qweight = _empty(torch.int32, in_size // rows, out_size // columns)
        self.qzeros = _empty(torch.int32, groups, out_size // WORD)
        self.scales = _empty(torch.float32, groups, out_size)
        self.bias = empty(out_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [n, in] × weight + bias, [n, out]."""
        if isinstance(self.weight, PackedInt4):
            return int4_linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)

    def loaders(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = ALL,
        source: tuple[slice, ...] = (ALL,),
    ) -> Iterator[WeightLoader]:
        """Yield loaders of `name`.qweight, .qzeros, .scales and the bias.

        shape: dense shape [out, in]. source: part of it to load, which must not split words or
        groups. rows: target outputs.
        """
        outputs, inputs = source[0], source[1] if len(source) > 1 else ALL
        group = self.stored.group_size
        down, across = (WORD, 1) if self.stored.method == "gptq" else (1, WORD)
        for attribute, in_unit, out_unit in (
            ("qweight", down, across),
            ("qzeros", group, WORD),
            ("scales", group, 1),
        ):
            whole = (shape[1] // in_unit, shape[0] // out_unit)
            part = (_divided(inputs, in_unit), _divided(outputs, out_unit))
            columns = _divided(rows, out_unit)
            yield WeightLoader(f"{name}.{attribute}", whole, self, attribute, ALL, part, columns)
        if self.bias is not None:
            yield WeightLoader(f"{name}.bias", shape[:1], self, "bias", rows, source[:1])

    def finish(self, quantization: str | None) -> None:
        """Convert the loaded weight to the kernel layout on a GPU, to a dense one on a CPU."""
        if uses_triton(self.qweight):
            weight: Weight | PackedInt4 = self._packed()
        else:
            dense = torch.empty(self.out_size, self.in_size, dtype=self.dtype)
            for inputs, slab in self._slabs():
                dense[:, inputs] = slab.dequantize().to(self.dtype)
            weight = pack_weight(dense, quantization)
        del self.qweight, self.qzeros, self.scales
        self.weight = weight if isinstance(weight, PackedInt4) else _kept(weight)

    def _packed(self) -> PackedInt4:
        packed = [pack_int4(slab) for _, slab in self._slabs()]
        words, scales, zeros = (
            torch.cat([getattr(each, name) for each in packed])
            for name in ("words", "scales", "zeros")
        )
        return PackedInt4(words, scales, zeros, self.in_size)

    def _slabs(self) -> Iterator[tuple[slice, Int4Groups]]:
        """Yield the unpacked weights, some inputs at a time, in whole groups and blocks."""
        group = self.stored.group_size
        size = math.lcm(SLAB, group)
        unpack, unit = (unpack_gptq, WORD) if self.stored.method == "gptq" else (unpack_awq, 1)
        for start in range(0, self.in_size, size):
            inputs = slice(start, min(start + size, self.in_size))
            groups = _divided(inputs, group)
            words = self.qweight.data[_divided(inputs, unit)]
            yield inputs, unpack(words, self.qzeros.data[groups], self.scales.data[groups])

    @property
    def packed_bytes(self) -> int:
        """Return the weight's bytes if it is no longer a parameter, else 0."""
        weight = getattr(self, "weight", None)
        return 0 if weight is None or isinstance(weight, nn.Parameter) else weight.nbytes


class Fp8Weight(nn.Module):
    """e4m3 weight [out, in] with a scale per row, and bias [out]."""

    weight: Weight  # a parameter until packed

    def __init__(self, stored: WeightFormat, out_size: int, in_size: int, bias: bool) -> None:
        super().__init__()
        self.stored, self.dtype = stored, torch.get_default_dtype()
        self.weight = _empty(FP8, out_size, in_size)
        self.weight_scale: nn.Parameter | None = _empty(torch.float32, out_size)
        # Static activation scales: one per merged layer, repeated for its rows.
        self.input_scale = _empty(torch.float32, out_size) if stored.static_scale else None
        self.bias = empty(out_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [n, in] × weightᵀ + bias, [n, out]; quantizes x if the weight is e4m3."""
        if self.weight_scale is None:
            return linear(x, self.weight, self.bias)
        assert isinstance(self.weight, torch.Tensor)
        return fp8_linear(x, self.weight, self.weight_scale, self.bias, self.input_scale)

    def loaders(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = ALL,
        source: tuple[slice, ...] = (ALL,),
    ) -> Iterator[WeightLoader]:
        """Yield loaders of `name`.weight, .weight_scale, .input_scale and the bias.

        shape: shape [out, in] in the checkpoint. source: part to load. rows: target rows.
        """
        yield WeightLoader(f"{name}.weight", shape, self, "weight", rows, source)
        scales, part = ((shape[0], 1), source[:1]) if self.stored.per_channel else ((), ())
        yield WeightLoader(f"{name}.weight_scale", scales, self, "weight_scale", rows, part)
        if self.input_scale is not None:
            yield WeightLoader(f"{name}.input_scale", (), self, "input_scale", rows, ())
        if self.bias is not None:
            yield WeightLoader(f"{name}.bias", shape[:1], self, "bias", rows, source[:1])

    def finish(self, quantization: str | None) -> None:
        """Dequantize the loaded weight, unless the device has e4m3 products."""
        rows, scale = self._parameters["weight"], self.weight_scale
        assert rows is not None and scale is not None, "weight is already packed"
        if uses_triton(rows):
            if self.input_scale is not None:  # the maximum: no merged layer's input saturates
                self.input_scale = nn.Parameter(self.input_scale.data.max()[None], False)
            return
        dense = torch.empty(rows.shape, dtype=self.dtype)
        for start in range(0, len(rows), SLAB):
            part = slice(start, start + SLAB)
            dense[part] = (rows.data[part].float() * scale.data[part, None]).to(self.dtype)
        self.weight_scale = self.input_scale = None
        del self.weight
        self.weight = _kept(pack_weight(dense, quantization))

    @property
    def packed_bytes(self) -> int:
        """Return the weight's bytes if it is no longer a parameter, else 0."""
        return 0 if "weight" in self._parameters else self.weight.nbytes


LinearWeight = DenseWeight | Int4Weight | Fp8Weight


def _empty(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def _divided(part: slice, unit: int) -> slice:
    """Convert a slice of elements to a slice of units of `unit` elements."""
    if part == ALL:
        return ALL
    assert part.start % unit == 0 == part.stop % unit, f"{part} splits a unit of {unit}"
    return slice(part.start // unit, part.stop // unit)
