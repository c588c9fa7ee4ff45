"""`octavo bench kernels --paper`: estimates for GPUs, from shapes and compiled code.

For each kernel and real shape: bytes, operations, programs; a lower bound of the time from the
device's bandwidth and matrix peak; resident blocks per multiprocessor; and properties of the
machine code. Nothing is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from octavo.kernels.paged_chunk import chunk_settings
from octavo.kernels.tiles import chunk_splits

from .linears import launches as linear_launches
from .resources import BLOCK_SIZE, HEAD_DIM, SHAPES, Compiled, Shape, examine, kernels
from .work import (
    IMAGES,
    Work,
    chunk_cases,
    chunk_work,
    join_chunks_work,
    token_works,
    vision_work,
)


@dataclass(frozen=True)
class Gpu:
    """A device's data sheet; the peak is for dense bfloat16."""

    name: str
    target: str
    multiprocessors: int
    bytes_per_s: float
    operations_per_s: float
    shared: int  # shared memory per multiprocessor, bytes
    registers: int = 65_536
    threads: int = 2048
    blocks: int = 32


GPUS = (
    Gpu("H100", "sm_90", 132, 3.35e12, 989e12, 228 << 10),
    Gpu("H200", "sm_90", 132, 4.8e12, 989e12, 228 << 10),
    Gpu("A100", "sm_80", 108, 2.0e12, 312e12, 164 << 10),
    Gpu("B200", "sm_100", 148, 8.0e12, 2250e12, 228 << 10),
)
RESERVED_SHARED = 1024  # bytes reserved by CUDA per block
E4M3_UNITS = ("QGMMA", "UTCQMMA")  # twice the bfloat16 rate


@dataclass(frozen=True)
class PaperRow:
    """One launch on one device."""

    kernel: str
    shape: str
    case: str
    device: str
    target: str
    bytes: int
    operations: int
    intensity: float  # operations per byte
    bound_us: float  # lower bound of the time
    bound_by: str  # "memory" or "matrix"
    grid: int
    blocks_per_multiprocessor: int
    occupancy: float  # resident threads / maximum threads
    waves: float
    registers: int
    spills: int
    shared: int
    tensor: str
    widest_load: int  # bytes per thread
    async_copy: str
    local: int


def blocks_per_multiprocessor(gpu: Gpu, made: Compiled) -> int:
    """Return the resident blocks per multiprocessor; registers are allocated in units of 256."""
    warps = made.threads // 32
    of_warp = -(-made.registers * 32 // 256) * 256
    limits = [
        gpu.registers // of_warp // warps,
        gpu.threads // made.threads,
        gpu.shared // (made.shared + RESERVED_SHARED),
        gpu.blocks,
    ]
    return min(limits)


def bound(gpu: Gpu, work: Work, unit: str) -> tuple[float, str]:
    """Return the lower bound in seconds and its cause; operations count only on matrix units."""
    memory = work.bytes / gpu.bytes_per_s
    peak = gpu.operations_per_s * (2 if unit in E4M3_UNITS else 1)
    matrix = work.operations / peak if unit != "-" else 0.0
    return max((memory, "memory"), (matrix, "matrix"))


def paper_row(gpu: Gpu, shape: Shape, kernel: str, work: Work, made: Compiled) -> PaperRow:
    seconds, by = bound(gpu, work, made.evidence.unit)
    resident = blocks_per_multiprocessor(gpu, made)
    return PaperRow(
        kernel=kernel,
        shape=shape.name,
        case=work.case,
        device=gpu.name,
        target=gpu.target,
        bytes=work.bytes,
        operations=work.operations,
        intensity=work.operations / work.bytes,
        bound_us=seconds * 1e6,
        bound_by=by,
        grid=work.grid,
        blocks_per_multiprocessor=resident,
        occupancy=resident * made.threads / gpu.threads,
        waves=work.grid / (gpu.multiprocessors * resident),
        registers=made.registers,
        spills=made.spills,
        shared=made.shared,
        tensor=made.evidence.unit,
        widest_load=made.evidence.widest_load,
        async_copy=made.evidence.async_copy,
        local=made.evidence.local,
    )


def works(shape: Shape, target: str) -> Iterator[tuple[str, Work]]:
    """Yield (kernel, work) of every case of a shape."""
    yield from token_works(shape)
    settings = {name: constants for name, (_, _, constants) in kernels(shape, target).items()}
    for tokens, context in chunk_cases():
        heads_of = (shape.heads, shape.kv_heads, HEAD_DIM, BLOCK_SIZE, torch.bfloat16)
        split = chunk_splits(tokens, context, shape.heads // shape.kv_heads, shape.kv_heads) > 1
        chosen = chunk_settings(*heads_of, target, (tokens,), split)
        name = next(name for name, constants in settings.items() if constants == chosen)
        sizes = (shape, tokens, context, int(chosen["BLOCK_M"]))
        yield name, chunk_work(*sizes)
        if split:
            yield "join_chunks", join_chunks_work(*sizes)
    for side in IMAGES:
        block_m = settings["vision_attention"]["BLOCK_M"]
        yield "vision_attention", vision_work((side // 14) ** 2, block_m)


def paper(models: list[str], devices: list[str], console: Console) -> list[PaperRow]:
    """Return the rows of every launch of these models, at each rank count, on these devices."""
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: kernels cannot be compiled; unset it")
    gpus = [gpu for gpu in GPUS if gpu.name in devices]
    shapes = [shape for shape in SHAPES.values() if shape.model in models]
    pairs = [(shape, gpu) for shape in shapes for gpu in gpus]
    rows = []
    for shape, gpu in track(pairs, description="compiling", console=console, transient=True):
        variants = kernels(shape, gpu.target).items()
        made = {name: examine(*variant, gpu.target) for name, variant in variants}
        rows += [
            paper_row(gpu, shape, name, work, made[name]) for name, work in works(shape, gpu.target)
        ]
        rows += [
            paper_row(gpu, shape, each.kernel, each.work, examine(*each.code, gpu.target))
            for each in linear_launches(shape, gpu.target, gpu.multiprocessors)
        ]
    return sorted(rows, key=lambda row: (row.kernel, row.device))


COLUMNS = {
    "kernel": lambda row: row.kernel,
    "shape": lambda row: row.shape,
    "case": lambda row: row.case,
    "device": lambda row: row.device,
    "MB": lambda row: f"{row.bytes / 1e6:.4g}",
    "GFLOP": lambda row: f"{row.operations / 1e9:.4g}",
    "FLOP/B": lambda row: f"{row.intensity:.3g}",
    "bound µs": lambda row: f"{row.bound_us:.3g}",
    "by": lambda row: row.bound_by,
    "grid": lambda row: str(row.grid),
    "blocks/SM": lambda row: str(row.blocks_per_multiprocessor),
    "occupancy": lambda row: f"{row.occupancy:.0%}",
    "waves": lambda row: f"{row.waves:.3g}",
    "registers": lambda row: str(row.registers),
    "spills": lambda row: str(row.spills),
    "shared KB": lambda row: f"{row.shared / 1024:.3g}",
    "matrix": lambda row: row.tensor,
    "load": lambda row: f"{row.widest_load} B",
    "async": lambda row: row.async_copy,
    "local": lambda row: str(row.local),
}


def summary(rows: list[PaperRow]) -> Table:
    """Return a table of each kernel's resources and code on each device; worst over the shapes."""
    names = ["kernel", "device", "blocks/SM", "occupancy", "registers", "spills", "shared KB"]
    names += ["matrix", "load", "async", "local"]
    made = Table(*names, title="Compiled code (worst over the shapes)")
    groups: dict[tuple[str, str], list[PaperRow]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.device), []).append(row)
    for group in groups.values():
        worst = max(group, key=lambda row: (row.spills, row.local, row.registers, row.shared))
        made.add_row(*(COLUMNS[name](worst) for name in names))
    return made


def launches(rows: list[PaperRow], shape: str, device: str) -> Table:
    """Return a table of every case of one shape on one device."""
    names = ["kernel", "case", "MB", "GFLOP", "FLOP/B", "bound µs", "by", "grid", "waves"]
    made = Table(*names, title=f"{shape} on one {device}: lower bounds")
    for row in rows:
        if (row.shape, row.device) == (shape, device):
            made.add_row(*(COLUMNS[name](row) for name in names))
    return made


def markdown(rows: list[PaperRow]) -> str:
    """Format all rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def run(
    models: list[str], devices: list[str], json_file: Path | None, markdown_file: Path | None
) -> None:
    """Print a summary of all kernels, and the first model's launches on the first device.

    Writes all rows to the files.
    """
    console = Console()
    rows = paper(models, devices, Console(stderr=True))
    console.print(summary(rows))
    console.print(launches(rows, models[0], devices[0]))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if markdown_file is not None:
        markdown_file.write_text(markdown(rows))
    for file in (json_file, markdown_file):
        if file is not None:
            print(f"{len(rows)} launches: {file}")
