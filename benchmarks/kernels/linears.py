"""Matmuls with quantized weights at the decoder's layers: compiled kernels and work per launch.

Run as `python -m octavo.benchmarks.kernels.linears [--target sm_90] [--shape 7B]`, without a GPU:
compiles all kernels and prints their resource usage over the shapes as rows of a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from octavo.kernels import fp8_linear, int4_linear, split_linear
from octavo.kernels.int4_layout import BLOCK, WORDS
from octavo.kernels.launch import LINEAR_SIZES

from .resources import HEAD_DIM, SHAPES, TARGETS, Compiled, Constants, Shape, examine
from .work import Work

ROWS = (1, 16, 32, 64, 512, 2048, 8192)  # tokens of decode steps and of prefill chunks
GROUP = 128  # inputs per scale of int4 weights
PADDED_INNER = {"72B": 29_696}  # Qwen pads the 72B model to whole groups
FP8_TARGETS = ("sm_90", "sm_100")
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class Layer:
    """One rank's shard of a linear layer, merged with other layers of the same input."""

    name: str
    in_size: int
    out_size: int
    has_bias: bool = False


@dataclass(frozen=True)
class LinearLaunch:
    kernel: str  # kernel and tile size, e.g. "int4_few"
    work: Work
    code: tuple[Any, list[str], Constants]  # kernel, argument types, compile-time settings


def layers(shape: Shape, inner: int) -> list[Layer]:
    width = shape.heads * HEAD_DIM
    return [
        Layer("qkv", shape.hidden, width + 2 * shape.kv_heads * HEAD_DIM, has_bias=True),
        Layer("o", width, shape.hidden),
        Layer("gate-up", shape.hidden, 2 * inner),
        Layer("down", inner, shape.hidden),
    ]


def int4_layers(shape: Shape) -> list[Layer]:
    """Return the int4 layers; empty if the ranks would split a group."""
    whole = PADDED_INNER.get(shape.model, shape.inner * shape.ranks)
    return layers(shape, whole // shape.ranks) if whole % (GROUP * shape.ranks) == 0 else []


def launches(
    shape: Shape,
    target: str,
    processors: int,
    rows: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[LinearLaunch]:
    """Yield every launch of the quantized layers, in the order of a step."""
    for n in rows or ROWS:
        for layer in int4_layers(shape):
            yield from _int4(layer, n, processors, target, dtype)
        for layer in layers(shape, shape.inner) if target in FP8_TARGETS else ():
            yield from _fp8(layer, n, processors, target, dtype)


def _int4(
    layer: Layer, n: int, processors: int, target: str, dtype: torch.dtype
) -> Iterator[LinearLaunch]:
    chosen = int4_linear.settings(n, layer.in_size, layer.out_size, processors, target)
    blocks = triton.cdiv(layer.in_size, BLOCK)
    splits = triton.cdiv(blocks, int(chosen["SPLIT"]))
    fixed = {"IN": layer.in_size, "OUT": layer.out_size, "GROUP": GROUP}
    fixed |= {"PLACE": int4_linear.SIXTEEN[dtype][1], "HAS_BIAS": layer.has_bias and splits == 1}
    b = _pointer(dtype)
    types = [b, "*i32", "*fp16", "*u8", b, b if splits == 1 else "*fp32", "i32", "i32", "i32"]
    of_group = 3 * BLOCK // GROUP  # bytes of scales and zeros per block and output
    stored = blocks * layer.out_size * (4 * WORDS + of_group) + 2 * n * layer.in_size
    code = (int4_linear._int4_linear_kernel, types, {**fixed, **chosen})
    yield _product("int4", layer, n, splits, stored, processors, target, code)
    if splits > 1:
        yield _join(layer, n, splits, b)


def _fp8(
    layer: Layer, n: int, processors: int, target: str, dtype: torch.dtype
) -> Iterator[LinearLaunch]:
    yield _quantize(layer, n, dtype)
    chosen = fp8_linear.settings(n, layer.in_size, layer.out_size, processors, target)
    splits = triton.cdiv(layer.in_size, fp8_linear.BLOCK_K * int(chosen["SPLIT"]))
    fixed = {"IN": layer.in_size, "OUT": layer.out_size}
    fixed |= {"HAS_BIAS": layer.has_bias and splits == 1}
    e4m3, b = "*fp8e4nv", _pointer(dtype)
    types = [e4m3, e4m3, "*fp32", "*fp32", b, b if splits == 1 else "*fp32", "i32"]
    stored = (layer.out_size + n) * (layer.in_size + 4)  # with a scale per row
    code = (fp8_linear._fp8_linear_kernel, types, {**fixed, **chosen})
    yield _product("fp8", layer, n, splits, stored, processors, target, code)
    if splits > 1:
        yield _join(layer, n, splits, b)


def _product(
    kernel: str,
    layer: Layer,
    n: int,
    splits: int,
    stored: int,
    processors: int,
    target: str,
    code: tuple[Any, list[str], Constants],
) -> LinearLaunch:
    """Return a matmul's launch; `stored` is bytes of weights and activations, without outputs."""
    size = split_linear.linear_size(kernel, target, n, layer.out_size, processors)
    tiles = split_linear.count_tiles(split_linear.LINEARS[kernel][target][size], n, layer.out_size)
    written = n * layer.out_size * (4 * splits if splits > 1 else 2)
    bias = 2 * layer.out_size if layer.has_bias and splits == 1 else 0
    operations = 2 * n * layer.in_size * layer.out_size
    work = Work(f"{layer.name}, {n} rows", stored + written + bias, operations, tiles * splits)
    return LinearLaunch(f"{kernel}_{size}", work, code)


def _join(layer: Layer, n: int, splits: int, pointer: str) -> LinearLaunch:
    numbers = n * layer.out_size
    moved = numbers * (4 * splits + 2) + (2 * layer.out_size if layer.has_bias else 0)
    grid = n * triton.cdiv(layer.out_size, split_linear.JOIN_BLOCK)
    work = Work(f"{layer.name}, {n} rows, {splits} parts", moved, numbers * splits, grid)
    chosen = split_linear.join_settings(layer.out_size, splits, layer.has_bias)
    types = ["*fp32", pointer, pointer, "i32"]
    return LinearLaunch("join_parts", work, (split_linear._join_parts_kernel, types, chosen))


def _quantize(layer: Layer, n: int, dtype: torch.dtype) -> LinearLaunch:
    """Return the launch that quantizes rows to e4m3: absmax, scale, quotient and clamping."""
    numbers = n * layer.in_size
    chosen: Constants = {**fp8_linear.quantize_settings(layer.in_size), "STATIC": False}
    work = Work(f"{layer.name}, {n} rows", 3 * numbers + 4 * n, 5 * numbers, n)
    types = [_pointer(dtype), "*fp8e4nv", "*fp32", "i32"]
    return LinearLaunch("quantize_rows", work, (fp8_linear._quantize_rows_kernel, types, chosen))


def _pointer(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _order(kernel: str) -> tuple[str, int]:
    """Return a sort key: kernel family, then tile size from small to large."""
    family, _, size = kernel.partition("_")
    return family, LINEAR_SIZES.index(size) if size in LINEAR_SIZES else 0


def table_row(kernel: str, target: str, made: Sequence[Compiled]) -> str:
    """Return a Markdown table row with a kernel's resource usage over the shapes."""
    cells = [
        kernel,
        target,
        _span([each.registers for each in made]),
        str(max(each.spills for each in made)),
        _span([round(each.shared / 1024, 1) for each in made]),
        ", ".join(sorted({each.evidence.unit for each in made})),
        f"{min(each.evidence.widest_load for each in made)} B",
        ", ".join(sorted({each.evidence.async_copy for each in made})),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    args = parser.parse_args()
    found: dict[tuple[str, str], list[Compiled]] = {}
    for target in args.target or list(TARGETS):
        for shape in args.shape or list(SHAPES):
            for each in launches(SHAPES[shape], target, PROCESSORS[target]):
                found.setdefault((each.kernel, target), []).append(examine(*each.code, target))
    print("| kernel | target | registers | spills | shared KB | matrix | loads | copies |")
    print("|---|---|---|---|---|---|---|---|")
    for kernel, target in sorted(found, key=lambda each: _order(each[0])):
        print(table_row(kernel, target, found[kernel, target]))


if __name__ == "__main__":
    main()
