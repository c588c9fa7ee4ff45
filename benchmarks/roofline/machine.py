"""This machine's limits: memory read bandwidth and matrix multiplication rates.

A multiply and an add are two operations. All torch threads are used; each figure is the best of
several repeats, as it is used as an upper bound.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from octavo.kernels import native
from octavo.kernels.linear import (
    PACKED_ROWS,
    ZERO,
    PackedWeight,
    linear,
    quantize_rows,
)
from octavo.kernels.panel_linear import pack_panels, quantize_panels

Product = Callable[[torch.Tensor], torch.Tensor]
INT8 = "int8"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements. The buffer must be far larger than the last-level cache."""

    buffer_bytes: int = 2_200_000_000
    rows: int = 512
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (17920, 1536), (5120, 1280))  # [out, in]
    repeats: int = 5


@dataclass(frozen=True)
class Machine:
    """The measured limits."""

    bandwidth: float  # bytes read per second
    peaks: dict[str, float]  # operations per second by number format: bfloat16, int8, ...

    def seconds(self, nbytes: int, operations: int, numbers: str) -> float:
        """Return the lower bound of the time of this work, in seconds."""
        return max(nbytes / self.bandwidth, operations / self.peaks[numbers])


@dataclass(frozen=True)
class Moment:
    """CPU time used by the machine and by this process up to a point in time, in seconds."""

    busy: float
    ours: float
    at: float

    @classmethod
    def now(cls) -> Moment:
        times = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = sum(times) - sum(times[3:5])  # excluding idle and iowait
        ours = sum(os.times()[:2])
        return cls(busy / os.sysconf("SC_CLK_TCK"), ours, time.perf_counter())

    def others_share(self) -> float:
        """Return the share of the machine's CPU time used by other processes since then."""
        now = Moment.now()
        others = now.busy - self.busy - (now.ours - self.ours)
        return max(0.0, others / (now.at - self.at) / (os.cpu_count() or 1))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure_machine(dtype: torch.dtype, sizes: Sizes) -> Machine:
    """Measure the bandwidth and the peaks of bfloat16, int8 and `dtype`."""
    kinds = {dtype, torch.bfloat16}
    peaks = {name_of(kind): matrix_peak(kind, None, sizes) for kind in kinds}
    return Machine(
        bandwidth=read_bandwidth(sizes.buffer_bytes, sizes.repeats),
        peaks=peaks | {INT8: matrix_peak(torch.bfloat16, INT8, sizes)},
    )


def read_bandwidth(nbytes: int, repeats: int) -> float:
    """Return the bytes per second read by a reduction: the faster of sum and max."""
    buffer = torch.ones(nbytes // 4)
    fastest = min(best_seconds(buffer.sum, repeats), best_seconds(buffer.max, repeats))
    return buffer.nbytes / fastest


@torch.inference_mode()
def matrix_peak(dtype: torch.dtype, quantization: str | None, sizes: Sizes) -> float:
    """Return the operations per second of the fastest matmul over weight layouts and shapes."""
    best = 0.0
    for out, size in sizes.shapes:
        x = torch.randn(sizes.rows, size).to(dtype)
        weight = torch.randn(out, size).to(dtype)
        for product in _products(x, weight, quantization):
            seconds = best_seconds(partial(product, x), sizes.repeats)
            best = max(best, 2 * sizes.rows * out * size / seconds)
    return best


def _products(x: torch.Tensor, weight: torch.Tensor, quantization: str | None) -> Iterator[Product]:
    """Yield every available matmul implementation, one at a time as each holds a weight."""
    panels = native.serves(weight)
    if quantization == INT8:
        yield _onednn_int8(x, weight)
        if panels:
            quantized = quantize_panels(weight)
            yield lambda x: linear(x, quantized)
        return
    yield lambda x: torch.nn.functional.linear(x, weight)
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        yield lambda x: linear(x, PackedWeight(reordered, weight.nbytes))
    if panels:
        packed = pack_panels(weight)
        yield lambda x: linear(x, packed)


def _onednn_int8(x: torch.Tensor, weight: torch.Tensor) -> Product:
    """Return oneDNN's int8 matmul on quantized inputs, without the quantization."""
    numbers, scale = quantize_rows(weight)
    packed = torch.ops.onednn.qlinear_prepack(numbers, list(x.shape))
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    unsigned = quantize_rows(x)[0].view(torch.uint8) ^ ZERO
    return lambda _: torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, ZERO, packed, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "",
    )  # fmt: skip


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the time of the fastest of `repeats` calls, after one warm-up call."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
