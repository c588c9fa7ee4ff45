"""Analysis of a compiled kernel's machine code: matrix instructions, load widths, async copies.

NVIDIA code is disassembled with the triton wheel's `nvdisasm`; AMD code is already text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SASS_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
GCN_OPCODE = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)", re.MULTILINE)
# wgmma, mma.sync (bf16, int8, fp8), tcgen05, and AMD's MFMA
TENSOR = re.compile(r"(HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|UTC[A-Z]*MMA|v_mfma)")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
GCN_WIDTHS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8}


@dataclass(frozen=True)
class Evidence:
    """Static instruction counts of a kernel (a loop's body counts once)."""

    tensor: dict[str, int]  # matrix instructions by name, e.g. HGMMA
    load_bytes: dict[int, int]  # bytes per thread -> loads from global memory to registers
    async_bytes: dict[int, int]  # bytes per thread -> asynchronous copies to shared memory
    bulk_copies: int  # tile copies by the copy engine (TMA)
    local: int  # loads and stores of local memory

    @property
    def unit(self) -> str:
        """The matrix instruction, or "-" if there is none."""
        return "+".join(self.tensor) or "-"

    @property
    def widest_load(self) -> int:
        return max([*self.load_bytes, *self.async_bytes], default=0)

    @property
    def async_copy(self) -> str:
        """The kind of asynchronous copies to shared memory, e.g. "LDGSTS 16 B"."""
        found = [f"LDGSTS {max(self.async_bytes)} B"] if self.async_bytes else []
        return "+".join(found + ["TMA"] * bool(self.bulk_copies)) or "-"


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def evidence(asm: dict[str, Any]) -> Evidence:
    """Analyze the output of `triton.compile`."""
    if "amdgcn" in asm:
        return read_gcn(asm["amdgcn"])
    return read_sass(disassemble(asm["cubin"]))


def read_sass(text: str) -> Evidence:
    opcodes = Counter(SASS_OPCODE.findall(text))
    tensor: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    copies: Counter[int] = Counter()
    bulk = local = 0
    for opcode, count in opcodes.items():
        name, *modifiers = opcode.split(".")
        if matrix := TENSOR.match(name):
            tensor[matrix[1]] += count
        elif name in ("LDG", "LDGSTS"):
            width = next((WIDTHS[m] for m in modifiers if m in WIDTHS), 4)
            (loads if name == "LDG" else copies)[width] += count
        elif name == "UTMALDG":
            bulk += count
        elif name in ("LDL", "STL"):
            local += count
    return Evidence(dict(tensor), dict(loads), dict(copies), bulk, local)


def read_gcn(text: str) -> Evidence:
    tensor: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    local = 0
    for opcode, count in Counter(GCN_OPCODE.findall(text)).items():
        if matrix := TENSOR.match(opcode):
            tensor[matrix[1]] += count
        elif match := re.match(r"(?:global|buffer)_load_(\w+?)(?:_d16(?:_hi)?)?$", opcode):
            loads[GCN_WIDTHS.get(match[1], 16)] += count
        elif opcode.startswith("scratch_"):
            local += count
    return Evidence(dict(tensor), dict(loads), {}, 0, local)
