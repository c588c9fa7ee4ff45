"""The launch table: every real shape on every architecture, and what others get."""

import pytest
import torch

from octavo.benchmarks.kernels.resources import SHAPES
from octavo.kernels import launch as table
from octavo.kernels.launch import FLOAT32, TABLE, architecture, launch
from octavo.kernels.paged_chunk import chunk_settings
from octavo.kernels.paged_decode import MAX_SPLITS, SPLIT_SIZE, num_splits
from octavo.kernels.tiles import chunk_splits, count_tiles, cut_chunks, cut_tiles

CPU = torch.device("cpu")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "other")


def test_every_kernel_has_a_row_for_every_architecture() -> None:
    assert set(TABLE) == set(FLOAT32)
    for kernel, rows in TABLE.items():
        assert tuple(rows) == ARCHITECTURES, kernel
        for arch, found in rows.items():
            for size in (found.block_m, found.block_n, found.num_warps):
                assert size & (size - 1) == 0
            if arch == "sm_90" and kernel != "decode":
                assert found.block_m == 16 * found.num_warps, "a warp group has 64 rows of wgmma"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_tile_holds_the_query_heads_of_a_kv_head(name: str, arch: str) -> None:
    shape = SHAPES[name]
    group = shape.heads // shape.kv_heads
    for kernel in ("chunk", "chunk_small", "decode"):
        for dtype in (torch.bfloat16, torch.float32):
            assert launch(kernel, arch, dtype, group).block_m >= group


def test_a_group_larger_than_the_tile_makes_it_larger() -> None:
    assert launch("decode", "sm_90", torch.bfloat16, 17).block_m == 32
    assert launch("decode", "sm_90", torch.bfloat16, 16).block_m == 16


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "sm_80"), ((8, 6), "other"), ((8, 9), "other"), ((9, 0), "sm_90"),
     ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "other"), ((7, 5), "other")],
)  # fmt: skip
def test_architecture_by_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert architecture.__wrapped__(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", "other")]
)
def test_architecture_of_amd(monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    class Properties:
        gcnArchName = name

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert architecture.__wrapped__(torch.device("cuda", 0)) == expected


def test_few_chunks_take_smaller_tiles() -> None:
    """7B: 18 tokens × 7 heads in a tile of 128; 4 KV heads; so up to 32 tiles are few."""

    def block_m(tokens: int) -> object:
        return chunk_settings(28, 4, 128, 16, torch.bfloat16, "sm_90", (0, tokens))["BLOCK_M"]

    assert table.FEW_PROGRAMS == 128
    assert (block_m(18 * 31), block_m(18 * 31 + 1)) == (64, 128)


def test_tiles_cover_every_token_once() -> None:
    lengths = (5, 0, 64, 65)
    rows, starts = (x.tolist() for x in cut_tiles(lengths, 32, CPU))
    assert list(zip(rows, starts, strict=True)) == [
        (3, 64),
        (3, 32),
        (3, 0),
        (2, 32),
        (2, 0),
        (0, 0),
    ]
    assert count_tiles(lengths, 32) == len(rows)
    assert cut_tiles((), 32, CPU)[0].shape == (0,)


def test_splits_of_a_grid_follow_from_the_table_alone() -> None:
    assert [num_splits(width, 16) for width in (1, 16, 17, 1024, 1025, 8192)] == [
        1,
        1,
        2,
        64,
        64,
        64,
    ]
    assert SPLIT_SIZE * MAX_SPLITS == 16 * 1024


def test_splits_of_a_chunk() -> None:
    """7B on four ranks, 512 tokens × 7 heads: 56 tiles of 64, so 4 splits, if there are keys."""
    contexts = (512, 1024, 2047, 2048, 4096, 131_072)
    assert [chunk_splits(512, context, 7, 1) for context in contexts] == [1, 1, 1, 2, 4, 4]
    assert chunk_splits(2048, 131_072, 7, 4) == 1, "896 programs are enough"
    assert chunk_splits(64, 131_072, 3, 1) == 8
    assert chunk_splits(0, 500, 7, 4) == 1


def test_split_tiles_and_what_joins_them() -> None:
    cut = cut_chunks((0, 40, 33), (1, 2, 1), 32, CPU)
    assert cut.tiles.tolist() == [
        [1, 32, 0, 2], [1, 32, 1, 2], [1, 0, 0, 2], [1, 0, 1, 2], [2, 32, 0, 1], [2, 0, 0, 1]
    ]  # fmt: skip
    assert cut.joins.tolist() == [[1, 32, 2, 0], [1, 0, 2, 2], [2, 32, 1, 4], [2, 0, 1, 5]]
