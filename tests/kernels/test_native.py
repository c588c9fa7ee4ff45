"""The compiled CPU kernels: there where they should be, the same bits whatever is beside, no leaks.

That they compute the right numbers is `test_kernels.py`'s, on the CPU path in bfloat16.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.kernels import native
from octavo.kernels.activation import quick_gelu, quick_gelu_ref
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.mrope import rotate_heads, rotate_ref
from octavo.kernels.paged_attention import paged_attention, paged_attention_ref
from octavo.kernels.paged_attention_cpu import SPLIT_SIZE
from octavo.kernels.vision_attention import vision_attention

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(native.library() is None, reason="no kernels for this processor")


def test_a_compiler_and_the_instructions_mean_compiled_kernels() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    if shutil.which("gcc") is None or "avx512_bf16" not in flags:
        pytest.skip("neither is to be had here")
    assert native.library() is not None
    assert native.serves(torch.ones(1, dtype=torch.bfloat16))
    assert not native.serves(torch.ones(1))


def test_they_run_on_torch_s_own_threads() -> None:
    """A second OpenMP in the process would fight with torch's for the cores."""
    if native.library() is None:
        pytest.skip("no kernels for this processor")
    torch.ones(300, 300) @ torch.ones(300, 300)
    x = torch.ones(512, 512, dtype=torch.bfloat16)
    quick_gelu(x)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}) == 1


def caches(num_blocks: int, kv_heads: int, block_size: int) -> list[torch.Tensor]:
    shape = (num_blocks, kv_heads, block_size, 128)
    return [torch.randn(shape).bfloat16() for _ in "kv"]


@needs_native
@pytest.mark.parametrize("context", [1, SPLIT_SIZE, SPLIT_SIZE + 1, 3 * SPLIT_SIZE - 5])
def test_parts_of_a_long_row_join(context: int) -> None:
    torch.manual_seed(context)
    blocks = -(-context // 16)
    kv = caches(blocks, 2, 16)
    batch = AttentionBatch.from_lists([1], [context], np.random.permutation(blocks)[None], 16, CPU)
    for size in (1, 20):  # large scores: the parts' sums differ by far
        q = (torch.randn(1, 12, 128) * size).bfloat16()
        found = paged_attention(q, *kv, batch, 128**-0.5)
        expected = paged_attention_ref(q, *kv, batch, 128**-0.5)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@needs_native
@pytest.mark.parametrize("group", [*range(1, 9), 13, 48])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 128), (64, 128), (5, 80), (16, 16)])
def test_rows_that_decode(group: int, block_size: int, head_dim: int) -> None:
    """Lengths that end anywhere in a step of 64 keys, in a block or in a part."""
    torch.manual_seed(group)
    lens = [1, 7, 63, 64, 65, 130, SPLIT_SIZE + 1, 2 * SPLIT_SIZE + 77]
    blocks = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(blocks)).tolist()
    tables = np.zeros((len(lens), max(blocks)), np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = [order.pop() for _ in range(count)]
    batch = AttentionBatch.from_lists([1] * len(lens), lens, tables, block_size, CPU)
    kv = [torch.randn(sum(blocks), 2, block_size, head_dim).bfloat16() for _ in "kv"]
    q = (3 * torch.randn(len(lens), 2 * group, head_dim)).bfloat16()
    found = paged_attention(q, *kv, batch, head_dim**-0.5)
    expected = paged_attention_ref(q, *kv, batch, head_dim**-0.5)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@needs_native
def test_a_row_that_decodes_does_not_depend_on_its_batch() -> None:
    """Bit for bit, also where other rows are longer and their parts come first."""
    torch.manual_seed(0)
    lens = [700, 33, 2000, 512]
    kv, tables = caches(125, 2, 16), np.random.default_rng(0).integers(0, 125, (4, 125))
    q = torch.randn(4, 14, 128).bfloat16()

    def run(rows: list[int]) -> torch.Tensor:
        counts, some = [1] * len(rows), [lens[row] for row in rows]
        batch = AttentionBatch.from_lists(counts, some, tables[rows], 16, CPU)
        return paged_attention(q[rows], *kv, batch, 0.1)

    together = run([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(run([row])[0], together[row])


@needs_native
@pytest.mark.parametrize("amx", [False, True])
def test_a_token_s_bits_do_not_depend_on_its_chunk_or_batch(
    monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    """A prompt of 300 tokens as one chunk, as pieces, and beside others."""
    torch.manual_seed(0)
    monkeypatch.setattr(native, "has_amx", lambda: amx)
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    kv, table = caches(64, 2, 16), torch.randperm(64)[:19].tolist()
    q = torch.randn(300, 12, 128).bfloat16()

    def run(counts: list[int], lens: list[int], queries: torch.Tensor) -> torch.Tensor:
        tables = [table] * len(counts)
        return paged_attention(
            queries, *kv, AttentionBatch.from_lists(counts, lens, tables, 16, CPU), 0.1
        )

    whole = run([300], [300], q)
    pieces = [run([b - a], [b], q[a:b]) for a, b in ((0, 7), (7, 150), (150, 298), (298, 300))]
    assert torch.equal(torch.cat(pieces), whole)
    beside = run([40, 300, 2], [90, 300, 2], torch.cat((q[:40], q, q[:2])))
    assert torch.equal(beside[40:340], whole)
    alone = run([1], [300], q[299:])
    assert torch.equal(run([40, 1], [90, 300], torch.cat((q[:40], q[299:])))[40:], alone)


@needs_native
def test_no_number_of_one_request_reaches_another() -> None:
    """NaN in one row's blocks and one frame's patches, and beyond a row's last token."""
    torch.manual_seed(0)
    kv = caches(8, 2, 16)
    q = torch.randn(22, 12, 128).bfloat16()
    batch = AttentionBatch.from_lists([1, 20, 1], [30, 20, 17], [[0, 1], [2, 3], [4, 5]], 16, CPU)
    before = paged_attention(q, *kv, batch, 0.1)
    for cache in kv:
        cache[2] = torch.nan  # the second row's
        cache[5, :, 1:] = torch.nan  # beyond the third's end
    after = paged_attention(q, *kv, batch, 0.1)
    assert torch.equal(after[[0, 21]], before[[0, 21]])
    assert after[1:21].isnan().all()

    qkv = torch.randn(40, 3, 2, 80).bfloat16()
    bounds = torch.tensor([0, 24, 40], dtype=torch.int32)
    before = vision_attention(*qkv.unbind(1), bounds, (24, 16), 0.1)
    qkv[30] = torch.nan
    after = vision_attention(*qkv.unbind(1), bounds, (24, 16), 0.1)
    assert torch.equal(after[:24], before[:24]) and after[24:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turns_and_gelu_in_place(dtype: torch.dtype) -> None:
    """Heads that are views of one product are turned where they lie."""
    torch.manual_seed(0)
    qkv = torch.randn(9, 3, 4, 80).to(dtype)
    angles = torch.randn(9, 40)
    q = qkv.unbind(1)[0]
    expected = rotate_ref(q, angles.cos(), angles.sin())
    others = qkv[:, 1:].clone()
    torch.testing.assert_close(rotate_heads(q, angles.cos(), angles.sin()), expected)
    assert torch.equal(qkv[:, 1:], others)
    for size in (1, 15, 4096, 70_001):
        x = torch.randn(size).to(dtype) * 4
        expected = quick_gelu_ref(x)
        torch.testing.assert_close(quick_gelu(x), expected, rtol=0.01, atol=1e-4)


def test_a_library_older_than_its_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a `git pull`: the sources, and so the arguments, may be others."""
    library = tmp_path / f"_kernels{native.EXTENSION_SUFFIXES[0]}"
    library.touch()
    (tmp_path / "rows.c").touch()
    os.utime(library, (1, 1))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "pip install -e ." in caplog.text
    finally:
        native.library.cache_clear()


def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".none"])
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert not native.serves(torch.ones(1, dtype=torch.bfloat16))
    finally:
        native.library.cache_clear()
