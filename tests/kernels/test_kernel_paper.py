"""`octavo bench kernels --paper`: formulas counted by hand, and the command at one shape."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from octavo.benchmarks.kernels import linears, paper
from octavo.benchmarks.kernels.linears import int4_layers
from octavo.benchmarks.kernels.linears import launches as linear_launches
from octavo.benchmarks.kernels.paper import GPUS, Gpu, blocks_per_multiprocessor, bound, paper_row
from octavo.benchmarks.kernels.resources import SHAPES, Compiled, Shape, shape_of
from octavo.benchmarks.kernels.sass import Evidence
from octavo.benchmarks.kernels.work import (
    Work,
    chunk_work,
    decode_work,
    join_chunks_work,
    join_work,
    mrope_work,
    norm_work,
    patches_work,
    swiglu_work,
    used_splits,
    vision_work,
)
from octavo.engine.cli.main import app
from octavo.kernels.paged_decode import num_splits

TINY = Shape("tiny", 1, 64, 48, 6, 2)
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")


def test_chunk_by_hand() -> None:
    """Two tokens at the end of five: they see 4 and 5 keys. A tile of 7 has 2 tokens × 3 heads."""
    work = chunk_work(TINY, 2, 5, 7)
    multiplies = 0
    for seen in (4, 5):
        for _head in range(6):
            multiplies += 2 * seen * 128  # scores, and weights times values
    assert work.operations == 2 * multiplies
    q_and_out, k_and_v = 2 * 2 * 6 * 128, 2 * 5 * 2 * 128
    assert work.bytes == 2 * (q_and_out + k_and_v) + 4
    assert work.grid == 1 * 2
    assert chunk_work(TINY, 5, 5, 7).grid == 3 * 2


def test_split_chunk_by_hand() -> None:
    """Two tokens of 4,096: a tile of 2 × 3 heads in 4 splits, whose parts are joined."""
    work, join = chunk_work(TINY, 2, 4096, 7), join_chunks_work(TINY, 2, 4096, 7)
    parts = 2 * 6 * 4 * (128 + 1) * 4
    assert work.bytes == 2 * 6 * 128 * 2 + 2 * 4096 * 2 * 128 * 2 + parts + 4 * 256
    assert (work.grid, join.grid) == (1 * 4 * 2, 1 * 2)
    assert join.bytes == parts + 2 * 6 * 128 * 2
    assert join.operations == 2 * 6 * 4 * 128 * 2


def test_decode_by_hand() -> None:
    """Three rows over 300 keys: two splits of 256 each."""
    work = decode_work(TINY, 3, 300)
    assert work.operations == 3 * 6 * 300 * 128 * 2 * 2
    kv, q = 3 * 2 * 300 * 2 * 128 * 2, 3 * 6 * 128 * 2
    partial = 3 * 6 * 2 * (128 + 1) * 4
    assert work.bytes == kv + q + partial + 3 * 19 * 4
    assert work.grid == 3 * 2 * 2
    halved = decode_work(TINY, 3, 300, fp8=True)
    assert (halved.operations, halved.grid) == (work.operations, work.grid)
    assert work.bytes - halved.bytes == 3 * 2 * 300 * 2 * (128 - 4)
    join = join_work(TINY, 3, 300)
    assert (join.bytes, join.grid) == (partial + 3 * 6 * 128 * 2, 18)
    assert join.operations == 3 * 6 * 2 * 128 * 2


def test_splits_of_a_row() -> None:
    lengths = (1, 256, 257, 4096, 16_384, 16_385, 131_072)
    assert [used_splits(length) for length in lengths] == [1, 1, 2, 16, 64, 33, 64]
    for length in lengths:
        assert used_splits(length) <= num_splits(-(-length // 16), 16)


def test_the_others_by_hand() -> None:
    vision = vision_work(10, 4)
    assert vision.operations == 16 * 10 * 10 * 80 * 2 * 2
    assert (vision.bytes, vision.grid) == (4 * 10 * 1280 * 2, 3 * 16)
    assert norm_work(64, 7, residual=False).bytes == 2 * (2 * 7 * 64 + 64)
    assert norm_work(64, 7, residual=True).bytes == 2 * (4 * 7 * 64 + 64)
    assert swiglu_work(1100, 3) == Work("3 tokens", 2 * 3 * 3300, 5 * 3300, 6)
    mrope = mrope_work(TINY, 5)
    turned_and_written = 2 * (6 + 2 + 2) * 128 * 2
    assert mrope.bytes == 5 * (turned_and_written + 2 * 64 * 4 + 8)
    assert mrope.operations == 5 * (6 + 2) * 64 * 6  # four products, two sums for each pair
    patches = patches_work(28)
    assert (patches.bytes, patches.grid) == (28 * 28 * 3 + 4 * 1176 * 2, 4)


def test_linears_by_hand() -> None:
    """Tiny's gate and up, 64 inputs to 2 × 48 outputs, three rows; of the 7B the down layer."""
    tiny = {each.work.case: each for each in linear_launches(TINY, "sm_90", 132, (3,))}
    assert int4_layers(TINY) == [], "48 inputs are no whole groups"
    gate_up = tiny["gate-up, 3 rows"]
    assert gate_up.kernel == "fp8_few"
    weights, rows, out = 96 * (64 + 4), 3 * (64 + 4), 3 * 96 * 2
    assert gate_up.work.bytes == weights + rows + out
    assert (gate_up.work.operations, gate_up.work.grid) == (2 * 3 * 64 * 96, 2)
    cases = list(linear_launches(SHAPES["7B"], "sm_90", 132, (16,)))
    down, joined = (
        next(each for each in cases if (each.kernel, each.work.case) == found)
        for found in (("int4_few", "down, 16 rows"), ("join_parts", "down, 16 rows, 4 parts"))
    )
    words, scales_and_zeros = 18_944 * 3584 // 2, 18_944 // 128 * 3584 * 3
    parts = 4 * 16 * 3584 * 4
    assert down.work.bytes == words + scales_and_zeros + 16 * 18_944 * 2 + parts
    assert (down.work.grid, joined.work.grid) == (56 * 4, 16 * 4)
    assert joined.work.bytes == parts + 16 * 3584 * 2


def test_which_ranks_share_weights_of_four_bits() -> None:
    """As `test_shards_fall_between_groups` has it of the engine; 72B padded as Qwen does."""
    served = [name for name, shape in SHAPES.items() if int4_layers(shape)]
    assert served == ["2B", "2B/2", "7B", "7B/2", "7B/4", "72B", "72B/2", "72B/4", "72B/8"]
    assert int4_layers(SHAPES["72B/8"])[3].in_size == 3712


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (188, 98_560, 256, 1),  # 192 × 32 registers a warp: 10 warps
        (114, 39_168, 128, 4),  # 120 × 32: 17 warps
        (32, 0, 256, 8),  # threads
        (32, 75_000, 128, 3),  # shared memory
        (16, 0, 32, 32),  # blocks
    ],
)
def test_blocks_of_a_multiprocessor(registers: int, shared: int, threads: int, blocks: int) -> None:
    made = Compiled(registers, 0, shared, threads, Evidence({}, {}, {}, 0, 0))
    assert blocks_per_multiprocessor(H100, made) == blocks


def test_bound_is_the_slower_of_memory_and_matrix() -> None:
    gpu = Gpu("slow", "sm_90", 10, 100.0, 1000.0, 1 << 16)
    work = Work("case", 50, 2000, 40)
    assert bound(gpu, work, "HGMMA") == (2.0, "matrix")
    assert bound(gpu, work, "QGMMA") == (1.0, "matrix")
    assert bound(gpu, work, "-") == (0.5, "memory")
    made = Compiled(32, 0, 0, 1024, Evidence({"HGMMA": 1}, {16: 1}, {}, 0, 0))
    row = paper_row(gpu, TINY, "kernel", work, made)
    assert (row.intensity, row.waves, row.occupancy) == (40.0, 40 / (10 * 2), 1.0)


def test_every_valid_rank_count_is_there() -> None:
    assert set(SHAPES) == {"2B", "2B/2", "2B/4", "7B", "7B/2", "7B/4", "72B", "72B/2", "72B/4",
                           "72B/8"}  # fmt: skip
    assert shape_of("2B", 4) == Shape("2B", 4, 1536, 2240, 3, 1)  # its 2 KV heads are on two each
    assert shape_of("72B", 8) == Shape("72B", 8, 8192, 3696, 8, 1)


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(paper, "SHAPES", {"2B": SHAPES["2B"]})
    monkeypatch.setattr(linears, "ROWS", (16,))
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("one_shape")
def test_command(tmp_path: Path) -> None:
    json_file, markdown = tmp_path / "p.json", tmp_path / "p.md"
    command = ["bench", "kernels", "--paper", "--model", "2B", "--gpu", "H100", "--gpu", "H200"]
    command += ["--json", str(json_file), "--markdown", str(markdown)]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    rows = json.loads(json_file.read_text())
    kernels = {row["kernel"] for row in rows}
    assert {"int4_few", "fp8_few", "join_parts", "quantize_rows"} <= kernels
    assert len(kernels) == 17 and all(kernel in done.output for kernel in kernels)
    assert len(markdown.read_text().splitlines()) == len(rows) + 2
    assert {row["tensor"] for row in rows} == {"-", "HGMMA", "HMMA", "QGMMA"}
    for row in rows:
        assert row["spills"] == row["local"] == 0
        assert row["bound_us"] > 0 and row["waves"] > 0 and 0 < row["occupancy"] <= 1
    chunks = [row for row in rows if row["kernel"].startswith("paged_chunk")]
    assert {row["case"] for row in chunks} >= {"512 of 131072", "8192 of 8192"}
    by_device = {(row["kernel"], row["case"], row["device"]): row["bound_us"] for row in rows}
    decode = [by_device["paged_decode", "16 × 4096", device] for device in ("H100", "H200")]
    assert decode[0] / decode[1] == pytest.approx(4.8 / 3.35)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--paper", "--gpu", "V100"], "--gpu 'V100': must be one of H100, H200, A100, B200"),
        (["--paper", "--model", "3B"], "--model '3B': must be one of 2B, 7B, 72B"),
        (["--gpu", "H100"], "--gpu: requires --paper"),
        (["--markdown", "x.md"], "--markdown: requires --paper"),
    ],
)
def test_what_the_command_rejects(options: list[str], text: str) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", *options])
    assert done.exit_code == 2 and text in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu() -> None:
    done = CliRunner().invoke(app, ["bench", "kernels"])
    assert done.exit_code == 0 and done.output.count("\n") == 1
