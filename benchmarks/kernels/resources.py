"""Compile every Triton kernel ahead of time, without a GPU, and report its resource usage.

Run as `python -m octavo.benchmarks.kernels.resources [--json] [--target sm_90]`. Shapes are those
of Qwen2-VL 2B, 7B and 72B on each number of ranks, in bfloat16. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo.benchmarks.kernels.sass import TOOLS, Evidence, evidence
from octavo.kernels import (
    activation,
    mrope,
    norm,
    paged_chunk,
    paged_decode,
    patches,
    vision_attention,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HEAD_DIM, BLOCK_SIZE = 128, 16
VISION_HEADS, VISION_HEAD_DIM = 16, 80
OPTIONS = ("num_warps", "num_stages")
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MANY_TOKENS, FEW_TOKENS = (1 << 20,), (32,)  # chunk sizes that select the large and the small tiles

Constants = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Layer sizes of one rank."""

    model: str
    ranks: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.ranks}" if self.ranks > 1 else self.model


MODELS = {"2B": (1536, 8960, 12, 2), "7B": (3584, 18944, 28, 4), "72B": (8192, 29568, 64, 8)}
RANKS = {"2B": (1, 2, 4), "7B": (1, 2, 4), "72B": (1, 2, 4, 8)}


def shape_of(model: str, ranks: int) -> Shape:
    """Return a rank's sizes; KV heads are replicated if there are fewer than ranks."""
    hidden, inner, heads, kv_heads = MODELS[model]
    return Shape(model, ranks, hidden, inner // ranks, heads // ranks, max(1, kv_heads // ranks))


SHAPES = {shape.name: shape for m in MODELS for n in RANKS[m] for shape in [shape_of(m, n)]}


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel: registers and spilled bytes per thread, memory per block."""

    kernel: str
    shape: str
    target: str
    registers: int
    spills: int
    shared: int
    threads: int


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled with its settings for one target."""

    registers: int
    spills: int
    shared: int
    threads: int
    evidence: Evidence


def kernels(
    shape: Shape, target: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[Any, list[str], Constants]]:
    """Return (kernel, argument types in order, compile-time settings) by name."""
    heads_of = (shape.heads, shape.kv_heads, HEAD_DIM, BLOCK_SIZE)
    rms = {"SIZE": shape.hidden, **norm.settings(shape.hidden, dtype)}
    i, f, long = "*i32", "*fp32", "*i64"
    b = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: f}[dtype]
    norm_types = [b] * 5 + ["fp32"]
    chunk_types = [b, b, b, b, b, b, f, f, i, i, i, i, "i32", "fp32"]
    decode_types = [b, b, b, b, b, f, f, i, i, i, i, "i32", "fp32"]
    many, few = (
        paged_chunk.chunk_settings(*heads_of, dtype, target, tokens)
        for tokens in (MANY_TOKENS, FEW_TOKENS)
    )
    split = paged_chunk.chunk_settings(*heads_of, dtype, target, FEW_TOKENS, split=True)
    patch = {"PATCH": 14, "TEMPORAL": 2, "MERGE": 2, "BLOCK_SIZE": 2048, **patches.SETTINGS}
    return {
        "rms_norm": (norm._rms_norm_kernel, norm_types, {**rms, "HAS_RESIDUAL": False}),
        "add_rms_norm": (norm._rms_norm_kernel, norm_types, {**rms, "HAS_RESIDUAL": True}),
        "swiglu": (
            activation._swiglu_kernel,
            [b, b],
            {"SIZE": shape.inner, **activation.SETTINGS},
        ),
        "mrope_write_kv": (
            mrope._mrope_write_kv_kernel,
            [b, b, b, f, f, long, b, b, b, b, b, "i32", "i32", "i32"],
            mrope.settings(*heads_of),
        ),
        "paged_chunk": (paged_chunk._paged_chunk_kernel, chunk_types, many),
        "paged_chunk_small": (paged_chunk._paged_chunk_kernel, chunk_types, few),
        "paged_chunk_split": (paged_chunk._paged_chunk_kernel, chunk_types, split),
        "join_chunks": (
            paged_chunk._join_chunks_kernel,
            [f, f, b, i, i],
            paged_chunk.join_settings(split),
        ),
        "paged_decode": (
            paged_decode._paged_decode_kernel,
            decode_types,
            paged_decode.decode_settings(*heads_of, dtype, target),
        ),
        "join_splits": (
            paged_decode._join_splits_kernel,
            [f, f, b, i, i, i, "i32"],
            paged_decode.join_settings(shape.heads, HEAD_DIM),
        ),
        "vision_attention": (
            vision_attention._vision_attention_kernel,
            [b, b, b, b, i, i, i, "i32", "i32", "i32", "i32", "fp32"],
            vision_attention.settings(VISION_HEAD_DIM, dtype, target),
        ),
        "cut_patches": (
            patches._cut_patches_kernel,
            ["*u8", b, "i32", "i32", "i32"] + ["fp32"] * 6,
            patch,
        ),
        **fp8_kernels(shape, target, dtype),
    }


def fp8_kernels(
    shape: Shape, target: str, dtype: torch.dtype
) -> dict[str, tuple[Any, list[str], Constants]]:
    """Return the kernels that write and read an e4m3 KV cache, as `kernels` does."""
    heads_of = (shape.heads, shape.kv_heads, HEAD_DIM, BLOCK_SIZE)
    b = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    i, f = "*i32", "*fp32"
    read = [b, "*i16", "*i16", f, f]
    written = ["*i64", b, "*u8", "*u8", f, f, "i32", "i32", "i32"]
    chunk = (paged_chunk._paged_chunk_kernel, [*read, b, f, f, i, i, i, i, "i32", "fp32"])
    made: dict[str, tuple[Any, list[str], Constants]] = {
        "mrope_write_kv_fp8": (
            mrope._mrope_write_kv_kernel,
            [b, b, b, f, f, *written],
            mrope.settings(*heads_of, fp8=True),
        ),
        "paged_decode_fp8": (
            paged_decode._paged_decode_kernel,
            [*read, f, f, i, i, i, i, "i32", "fp32"],
            paged_decode.decode_settings(*heads_of, dtype, target, fp8=True),
        ),
    }
    variants = {
        "": (MANY_TOKENS, False),
        "_small": (FEW_TOKENS, False),
        "_split": (FEW_TOKENS, True),
    }
    for name, (tokens, split) in variants.items():
        chosen = paged_chunk.chunk_settings(*heads_of, dtype, target, tokens, split, fp8=True)
        made[f"paged_chunk{name}_fp8"] = (*chunk, chosen)
    return made


def compile_kernel(kernel: Any, types: list[str], constants: Constants, target: str) -> Any:
    """Compile a kernel. Pointers and strides are declared multiples of 16, as torch's are."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    fixed = {name: value for name, value in constants.items() if name not in OPTIONS}
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(fixed, "constexpr")
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride")
    }
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in fixed.items()}, aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def examine(kernel: Any, types: list[str], constants: Constants, target: str) -> Compiled:
    """Compile a kernel (cached) and analyze its machine code."""
    return _examine(kernel, tuple(types), tuple(sorted(constants.items())), target)


@cache
def _examine(
    kernel: Any, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], target: str
) -> Compiled:
    compiled = compile_kernel(kernel, list(types), dict(constants), target)
    count = _amd_usage if target.startswith("gfx") else _nvidia_usage
    registers, spills = count(compiled.asm)
    threads = compiled.metadata.num_warps * TARGETS[target].warp_size
    return Compiled(registers, spills, compiled.metadata.shared, threads, evidence(compiled.asm))


def _nvidia_usage(asm: dict[str, Any]) -> tuple[int, int]:
    """Return a thread's registers and local bytes, from the cuobjdump of the triton wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(asm: dict[str, Any]) -> tuple[int, int]:
    text = asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    assert registers and spills
    return int(registers[1]), int(spills[1])


def table(
    targets: list[str], shapes: list[str], dtype: torch.dtype
) -> Iterator[tuple[Resources, Evidence]]:
    """Yield the resources and the code analysis of each kernel."""
    for target in targets:
        for shape in shapes:
            for name, (kernel, types, constants) in kernels(SHAPES[shape], target, dtype).items():
                made = examine(kernel, types, constants, target)
                used = (made.registers, made.spills, made.shared, made.threads)
                yield Resources(name, shape, target, *used), made.evidence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", action="store_true", help="print JSON Lines")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: kernels cannot be compiled; unset it")
    if not args.json:
        print(f"{'kernel':20}{'shape':7}{'target':8}{'registers':>10}{'spills':>8}{'shared':>9}")
    targets, shapes = args.target or list(TARGETS), args.shape or list(SHAPES)
    for row, code in table(targets, shapes, getattr(torch, args.dtype)):
        if args.json:
            print(json.dumps({**asdict(row), **asdict(code)}), flush=True)
        else:
            print(
                f"{row.kernel:20}{row.shape:7}{row.target:8}{row.registers:>10}{row.spills:>8}"
                f"{row.shared:>9}  {code.unit:8}{code.async_copy}",
                flush=True,
            )


if __name__ == "__main__":
    main()
