"""`octavo bench kernels` on a GPU: correctness of each kernel, and its share of peak performance.

Shares are relative to rates measured in the same run with torch's copy and cuBLAS's matmul. Not
yet run on hardware.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .cases import Case, cases
from .resources import SHAPES

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Peaks:
    """Measured rates of a device."""

    bytes_per_s: float  # read plus written, in a large copy
    operations_per_s: float  # in a large bfloat16 matmul


@dataclass(frozen=True)
class GpuRow:
    """Results of one kernel at one shape."""

    kernel: str
    shape: str
    case: str
    error: float  # largest absolute difference from the reference
    right: bool  # all differences are within the dtype's tolerance
    ms: float
    peer_ms: float | None  # torch's equivalent
    of_bandwidth: float  # minimum bytes / time / the device's measured rate
    of_peak: float | None  # the same for operations; None for kernels without matmuls


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the median time of repeated runs, flushing caches between them."""
    return float(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median"))


def measure_peaks(device: torch.device, timer: Timer, size: int = 8192) -> Peaks:
    """Measure a copy of 16 × size² bytes and a matmul of size³."""
    source = torch.zeros(16 * size**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = timer(lambda: target.copy_(source))
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    product_ms = timer(lambda: a @ b)
    return Peaks(2 * source.nbytes / copy_ms * 1e3, 2 * size**3 / product_ms * 1e3)


def check(case: Case) -> tuple[float, bool]:
    """Return the largest difference from the reference, and whether all are within tolerance."""
    found, expected = case.run(), case.oracle()
    tolerance = TOLERANCE[found.dtype]
    right = torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    return float((found.float() - expected.float()).abs().max()), right


def gpu_row(case: Case, peaks: Peaks, timer: Timer) -> GpuRow:
    error, right = check(case)
    ms = timer(case.run)
    rate = 1e3 / ms
    return GpuRow(
        kernel=case.kernel,
        shape=case.shape,
        case=case.work.case,
        error=error,
        right=right,
        ms=ms,
        peer_ms=timer(case.peer) if case.peer else None,
        of_bandwidth=case.work.bytes * rate / peaks.bytes_per_s,
        of_peak=case.work.operations * rate / peaks.operations_per_s if case.multiplies else None,
    )


def as_table(rows: list[GpuRow], title: str) -> Table:
    names = ("kernel", "shape", "case", "error", "ms", "torch ms", "speedup", "of bandwidth",
             "of matrix peak")  # fmt: skip
    made = Table(*names, title=title)
    for row in rows:
        peer, peak = row.peer_ms, row.of_peak
        made.add_row(
            row.kernel,
            row.shape,
            row.case,
            f"{row.error:.2g}" if row.right else f"WRONG {row.error:.2g}",
            f"{row.ms:.4g}",
            "-" if peer is None else f"{peer:.4g}",
            "-" if peer is None else f"{peer / row.ms:.2f}",
            f"{row.of_bandwidth:.0%}",
            "-" if peak is None else f"{peak:.0%}",
        )
    return made


def run(models: list[str], json_file: Path | None) -> bool:
    """Print the table; return False if a kernel is wrong. Does nothing without a GPU."""
    if not torch.cuda.is_available():
        print("no GPU here; octavo bench kernels --paper works without one")
        return True
    device, console = torch.device("cuda"), Console()
    peaks = measure_peaks(device, milliseconds)
    made = [
        gpu_row(case, peaks, milliseconds)
        for model in track(models, description="running", console=Console(stderr=True))
        for case in cases(SHAPES[model], device, torch.bfloat16)
    ]
    title = f"{torch.cuda.get_device_name()}: copy {peaks.bytes_per_s / 1e12:.2f} TB/s, "
    console.print(as_table(made, title + f"matmul {peaks.operations_per_s / 1e12:.0f} TF/s"))
    if json_file is not None:
        report = {"peaks": asdict(peaks), "rows": [asdict(row) for row in made]}
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    return all(row.right for row in made)
