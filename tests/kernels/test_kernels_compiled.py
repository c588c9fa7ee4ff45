"""The Triton kernels themselves, compiled for GPUs that are not here, in a process of their own."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
import triton

from octavo.benchmarks.kernels.linears import PROCESSORS, LinearLaunch, launches
from octavo.benchmarks.kernels.resources import SHAPES, SHARED_LIMIT, TARGETS, examine
from octavo.benchmarks.kernels.sass import read_gcn, read_sass

CHUNK = ("paged_chunk", "paged_chunk_small", "paged_chunk_split")
FP8 = tuple(f"{kernel}_fp8" for kernel in (*CHUNK, "paged_decode"))  # over a cache in e4m3
ATTENTION = (*CHUNK, "paged_decode", "vision_attention", *FP8)
SCALAR = ("cut_patches",)  # reads single bytes, a pixel's channel at a time
NVIDIA = ("sm_80", "sm_90", "sm_100")


@cache
def compiled(target: str, shapes: tuple[str, ...], dtype: str = "bfloat16") -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "octavo.benchmarks.kernels.resources", "--json"]
    command += ["--target", target, "--dtype", dtype]
    command += [word for shape in shapes for word in ("--shape", shape)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_resources(rows: list[dict[str, Any]], shapes: tuple[str, ...]) -> None:
    """Nothing spills, and a block fits; `-s` prints the rows."""
    kernels = {row["kernel"] for row in rows}
    assert {
        *ATTENTION,
        *SCALAR,
        "join_splits",
        "join_chunks",
        "rms_norm",
        "swiglu",
        "mrope_write_kv",
        "mrope_write_kv_fp8",
    } <= kernels
    assert {(row["kernel"], row["shape"]) for row in rows} == {
        (kernel, shape) for kernel in kernels for shape in shapes
    }
    for row in rows:
        print(row)
        assert row["spills"] == 0 and row["local"] == 0, row
        assert 0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255), row
        assert row["shared"] <= SHARED_LIMIT[row["target"]], row


def check_code(rows: list[dict[str, Any]]) -> None:
    """On NVIDIA: 16-byte loads throughout, and keys and values come by asynchronous copies."""
    for row in rows:
        if row["kernel"] not in SCALAR:
            assert "16" in {**row["load_bytes"], **row["async_bytes"]}, row
        if row["kernel"] in ATTENTION:
            copies = row["async_bytes"]
            assert set(copies) <= {"4", "16"}, row  # 4: the block table's numbers, scales
            assert copies["16"] >= (0.3 if row["kernel"] in FP8 else 4) * copies.get("4", 0), row
        wanted = unit(row["kernel"], row["target"])
        assert list(row["tensor"]) == wanted, row


def unit(kernel: str, target: str) -> list[str]:
    """The matrix instruction that a kernel is to use. Decode has too few queries for wgmma (64)
    and for tcgen05 (64)."""
    if kernel not in ATTENTION:
        return []
    if target == "gfx942":
        return ["v_mfma"]
    wide = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[target]
    return ["HMMA" if kernel.startswith("paged_decode") else wide]


# The other shapes: test_kernels_compile_at_every_rank_count.
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str) -> None:
    rows = compiled(target, ("7B",))
    check_resources(rows, ("7B",))
    if target in NVIDIA:
        check_code(rows)
    for row in rows:
        assert list(row["tensor"]) == unit(row["kernel"], target), row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_at_every_rank_count(target: str) -> None:
    rows = compiled(target, tuple(SHAPES))
    check_resources(rows, tuple(SHAPES))
    if target in NVIDIA:
        check_code(rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", TARGETS)
def test_other_precisions_do_not_spill_either(target: str, dtype: str) -> None:
    rows = compiled(target, ("7B",), dtype)
    check_resources(rows, ("7B",))


def linear_unit(kernel: str, target: str) -> list[str]:
    """The matrix instruction of a product with quantised weights. They are its 64 or 128 rows, so
    that wgmma and tcgen05 serve decode too."""
    tiles = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    e4m3 = {"sm_90": "QGMMA", "sm_100": "UTCQMMA"}
    found = {"int4": tiles, "fp8": e4m3}.get(kernel.partition("_")[0], {}).get(target)
    return [found] if found else []


def check_linear(found: LinearLaunch, target: str) -> None:
    """As `check_resources` and `check_code` of the others."""
    made, row = examine(*found.code, target), f"{target} {found}"
    code = made.evidence
    assert made.spills == 0 and code.local == 0, row
    assert 0 < made.registers <= 255 and made.shared <= SHARED_LIMIT[target], row
    assert list(code.tensor) == linear_unit(found.kernel, target), row
    if target in NVIDIA:
        assert code.widest_load == 16, row
    if target in NVIDIA and code.tensor:
        assert set(code.async_bytes) == {16}, row


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled")
@pytest.mark.parametrize(
    ("target", "rows", "layers"),
    [
        ("sm_90", (16, 64, 8192), ("down",)),
        ("sm_90", (32,), ("o",)),
        ("sm_80", (16, 8192), ("o",)),
        ("sm_100", (16, 64, 8192), ("o",)),
        ("gfx942", (16, 8192), ("o",)),
    ],
)
def test_linears_compile(target: str, rows: tuple[int, ...], layers: tuple[str, ...]) -> None:
    kernels = set()
    for found in launches(SHAPES["7B"], target, PROCESSORS[target], rows):
        if found.work.case.startswith(layers):
            check_linear(found, target)
            kernels.add(found.kernel)
    expected = {"int4_some"} if rows == (32,) else {"int4_few", "int4_wide", "join_parts"}
    if target in ("sm_90", "sm_100"):
        expected |= {"quantize_rows", "fp8_wide" if 8192 in rows else "fp8_some"}
    assert expected <= kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", TARGETS)
def test_linears_compile_at_every_rank_count(target: str, dtype: str) -> None:
    shapes = SHAPES if dtype == "bfloat16" else ("7B",)
    for shape in shapes:
        of = (SHAPES[shape], target, PROCESSORS[target], (16, 32, 64, 512, 2048, 8192))
        for found in launches(*of, getattr(torch, dtype)):
            check_linear(found, target)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0100*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0120*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0130*/             @!UP1 LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], !P1 ;
        /*0140*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0150*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*10160*/                  STL.64 [R1+0x8], R4 ;
        /*10170*/                  LDL.LU R4, [R1+0x8] ;
        /*10180*/                  UTMALDG.2D [UR8], [UR4] ;
"""


def test_evidence_is_read_from_machine_code() -> None:
    found = read_sass(SASS)
    assert found.tensor == {"HGMMA": 2}
    assert found.load_bytes == {16: 1, 2: 1, 4: 1} and found.async_bytes == {16: 1}
    assert (found.bulk_copies, found.local, found.widest_load) == (1, 2, 16)
    assert found.async_copy == "LDGSTS 16 B+TMA"
    text = """
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_load_ushort v1, v2, s[0:3], 0 offen
	v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
	scratch_store_dword off, v1, s32
"""
    found = read_gcn(text)
    assert (found.tensor, found.load_bytes, found.local) == ({"v_mfma": 1}, {16: 1, 2: 1}, 1)
