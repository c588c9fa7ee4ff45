"""Compiles every Triton kernel ahead of time, without a GPU, and tells what each one uses.

Run as `python -m octavo.benchmarks.kernel_resources [--json] [--target sm_90]`. Shapes are those of
Qwen2-VL 2B, 7B and 72B on one rank, in bfloat16. The interpreter's switch must be off.
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
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
# hidden size, MLP size, heads, KV heads; head size 128, vision head size 80
SHAPES = {
    "2B": (1536, 8960, 12, 2),
    "7B": (3584, 18944, 28, 4),
    "72B": (8192, 29568, 64, 8),
}
HEAD_DIM, VISION_HEAD_DIM, BLOCK_SIZE = 128, 80, 16
OPTIONS = ("num_warps", "num_stages")
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

Constants = dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: a thread's registers and spilled bytes, a block's memory."""

    kernel: str
    shape: str
    target: str
    registers: int
    spills: int
    shared: int


def kernels(shape: str) -> Iterator[tuple[Any, list[str], Constants]]:
    """(kernel, argument types in order, compile-time settings) of one model's shape."""
    hidden, inner, heads, kv_heads = SHAPES[shape]
    bf16, heads_of = torch.bfloat16, (heads, kv_heads, HEAD_DIM, BLOCK_SIZE)
    rms = {"SIZE": hidden, **norm.settings(hidden)}
    b, i, f, long = "*bf16", "*i32", "*fp32", "*i64"
    for has_residual in (False, True):
        constants = {**rms, "HAS_RESIDUAL": has_residual}
        yield norm._rms_norm_kernel, [b] * 5 + ["fp32"], constants
    yield activation._swiglu_kernel, [b, b], {"SIZE": inner, **activation.SETTINGS}
    yield (
        mrope._mrope_write_kv_kernel,
        [b, b, b, f, f, long, b, b, b, "i32", "i32", "i32"],
        mrope.settings(*heads_of),
    )
    yield (
        paged_chunk._paged_chunk_kernel,
        [b, b, b, b, i, i, i, i, i, "i32", "fp32"],
        paged_chunk.chunk_settings(*heads_of, bf16),
    )
    yield (
        paged_decode._paged_decode_kernel,
        [b, b, b, f, f, i, i, i, i, "i32", "fp32"],
        paged_decode.decode_settings(*heads_of, bf16),
    )
    yield (
        paged_decode._join_splits_kernel,
        [f, f, b, i, i, i, "i32"],
        paged_decode.join_settings(heads, HEAD_DIM),
    )
    yield (
        vision_attention._vision_attention_kernel,
        [b, b, b, b, i, i, i, "i32", "i32", "i32", "i32", "fp32"],
        vision_attention.settings(VISION_HEAD_DIM, bf16),
    )
    patch = {"PATCH": 14, "TEMPORAL": 2, "MERGE": 2, "BLOCK_SIZE": 2048, **patches.SETTINGS}
    yield patches._cut_patches_kernel, ["*u8", b, "i32", "i32", "i32"] + ["fp32"] * 6, patch


def compile_kernel(kernel: Any, types: list[str], constants: Constants, target: str) -> Any:
    """The compiled kernel. Pointers and strides are multiples of 16, as torch's are."""
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


def measure(kernel: Any, types: list[str], constants: Constants, shape: str, target: str) -> Any:
    compiled = compile_kernel(kernel, types, constants, target)
    count = _amd_usage if target.startswith("gfx") else _nvidia_usage
    registers, spills = count(compiled.asm)
    name = kernel.__name__ + ("+residual" if constants.get("HAS_RESIDUAL") else "")
    return Resources(name, shape, target, registers, spills, compiled.metadata.shared)


def _nvidia_usage(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and local bytes of a thread, from the wheel's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(asm: dict[str, Any]) -> tuple[int, int]:
    text = asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    assert registers and spills
    return int(registers[1]), int(spills[1])


def table(targets: list[str], shapes: list[str]) -> Iterator[Resources]:
    """What each kernel uses; a kernel that is the same for two shapes is compiled once."""
    for target in targets:
        done: dict[str, Resources] = {}
        for shape in shapes:
            for kernel, types, constants in kernels(shape):
                key = f"{kernel.__name__}{sorted(constants.items())}"
                if key not in done:
                    done[key] = measure(kernel, types, constants, shape, target)
                yield Resources(**{**asdict(done[key]), "shape": shape})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    if not args.json:
        print(f"{'kernel':34}{'shape':7}{'target':8}{'registers':>10}{'spills':>8}{'shared':>9}")
    for row in table(args.target or list(TARGETS), args.shape or list(SHAPES)):
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(
                f"{row.kernel:34}{row.shape:7}{row.target:8}{row.registers:>10}{row.spills:>8}"
                f"{row.shared:>9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
