"""Decode steps on static tensors, as replayed by a captured graph. Capturing requires a GPU.

The tests that compute run in Triton's interpreter (`test_interpreter.py` runs this file): there,
as in a graph, nothing may depend on host values, while the CPU path reads lengths from the host.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_requests import TinyDriver, TinyRequest, tiny_request
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.batch import EmbeddingSlice, InputBatch
from octavo.engine.runner.decode_graph import (
    ROWS,
    Bucket,
    Compute,
    DecodeGraphs,
    StaticDecode,
    buckets,
)
from octavo.engine.runner.model_runner import ModelRunner
from octavo.kernels import paged_decode
from octavo.kernels.paged_attention import AttentionBatch

CPU = torch.device("cpu")
NUM_BLOCKS = 64
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs in the interpreter"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def make_runner(folder: Path) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    runner = ModelRunner(folder, config, preprocess, CPU, torch.float32, 16, TensorParallel())
    runner.load()
    runner.allocate(NUM_BLOCKS)
    return runner


def texts(config: ModelConfig) -> list[TinyRequest]:
    lengths = (5, 15, 33)
    rng = np.random.default_rng(0)
    return [tiny_request(config, [rng.integers(0, 256, n).tolist()]) for n in lengths]


def run(runner: ModelRunner) -> tuple[list[list[int]], list[InputBatch]]:
    """Run three prompts, then decode steps of varying rows; return the tokens and the batches."""
    driver, rows = TinyDriver(runner, NUM_BLOCKS), texts(runner.config)
    driver.step(rows, [len(row.token_ids) for row in rows])
    steps = []
    for present in ([0, 1, 2], [0, 1, 2], [2], [1, 0], [0, 1, 2], [1]):
        now = [rows[i] for i in present]
        steps.append(driver.build(now, [1] * len(now)))
        driver.step(now, [1] * len(now))
    return [row.output_token_ids for row in rows], steps


def static_of(runner: ModelRunner, max_tokens: int = 8192) -> StaticDecode:
    return StaticDecode(runner.model.decoder, runner.caches, max_tokens, CPU)


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[ModelRunner, list[list[int]], InputBatch]:
    """Return a runner without graphs, its output tokens, and its first decode step."""
    runner = make_runner(folder)
    tokens, steps = run(runner)
    return runner, tokens, steps[0]


@pytest.fixture
def decode_step(plain: tuple[ModelRunner, list[list[int]], InputBatch]) -> InputBatch:
    return plain[2]


@interpreted
def test_padded_static_steps_match_plain_steps(
    folder: Path, plain: tuple[ModelRunner, list[list[int]], InputBatch]
) -> None:
    """A "captured" function knows only its bucket; it must read the rest from static tensors."""
    padded = make_runner(folder)
    captured: list[Compute] = []

    def capture(compute: Compute) -> Compute:
        captured.append(compute)
        return compute

    padded.graphs = DecodeGraphs(static_of(padded), capture)
    found = run(padded)[0]
    assert found == plain[1] and len({tuple(tokens) for tokens in found}) == 3
    assert set(padded.graphs.replays) == {Bucket(4, 256), Bucket(1, 256), Bucket(2, 256)}
    assert len(captured) == 2  # buckets of 4 and 1 rows ran twice, that of 2 once
    for ours, theirs in zip(padded.caches, plain[0].caches, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
def test_logits_are_of_the_sampled_rows(folder: Path, decode_step: InputBatch) -> None:
    runner = make_runner(folder)
    graphs = DecodeGraphs(static_of(runner), lambda compute: compute)
    bucket = graphs.bucket_of(decode_step)
    assert bucket == Bucket(4, 256)
    token_ids = torch.from_numpy(decode_step.token_ids)
    whole = graphs.logits(token_ids, decode_step, bucket)
    fewer = replace(decode_step, sampling=replace(decode_step.sampling, rows=np.array([2, 0])))
    found = graphs.logits(token_ids, fewer, bucket)
    assert whole is not None and found is not None
    torch.testing.assert_close(found, whole[[2, 0]])
    none = replace(decode_step, sampling=replace(decode_step.sampling, rows=np.array([], int)))
    assert graphs.logits(token_ids, none, bucket) is None


@interpreted
def test_failed_capture_falls_back_to_plain_steps(
    folder: Path, plain: tuple[ModelRunner, list[list[int]], InputBatch]
) -> None:
    def fail(compute: Compute) -> Compute:
        raise RuntimeError("no capture here")

    runner = make_runner(folder)
    runner.graphs = DecodeGraphs(static_of(runner), fail)
    assert run(runner)[0] == plain[1]
    assert runner.graphs.failed and len(runner.graphs.replays) == 1


def test_padding_writes_nothing_and_sees_one_key(folder: Path, decode_step: InputBatch) -> None:
    """Also holds after a step with more rows."""
    static = static_of(make_runner(folder))
    three = Bucket(4, 256)
    static.fill(torch.from_numpy(decode_step.token_ids), decode_step, three)
    lens = decode_step.context_lens.tolist()
    assert static.context_lens[:4].tolist() == [*lens, 1]
    tables = decode_step.block_tables
    assert static.slot_mapping[:4].tolist() == [
        *(int(tables[row, (n - 1) // 16]) * 16 + (n - 1) % 16 for row, n in enumerate(lens)), -1
    ]  # fmt: skip
    one = replace(
        decode_step, positions=decode_step.positions[:, :1], block_tables=tables[:1],
        context_lens=decode_step.context_lens[:1],
    )  # fmt: skip
    static.fill(torch.tensor([7]), one, three)
    assert static.context_lens[:4].tolist() == [lens[0], 1, 1, 1]
    assert static.slot_mapping[1:4].tolist() == [-1, -1, -1]
    assert static.token_ids[0] == 7 and torch.equal(
        static.block_tables[0, : tables.shape[1]], torch.from_numpy(tables[0])
    )


def table_of(rows: int, width: int, step: InputBatch) -> InputBatch:
    return replace(
        step,
        num_scheduled_tokens=np.ones(rows, np.int32),
        block_tables=np.zeros((rows, width), np.int32),
    )


def test_buckets_cover(decode_step: InputBatch) -> None:
    for rows in range(1, ROWS[-1] + 1):
        for width in (1, 256, 257, 2048):
            found = buckets(table_of(rows, width, decode_step), (256, 2048))
            assert found is not None and found.rows >= rows and found.blocks >= width
            assert found.rows < 2 * rows, "at least half is padding"
            assert found.blocks == (256 if width <= 256 else 2048)
    assert tuple(sorted(ROWS)) == ROWS


def test_steps_that_cannot_use_a_graph(decode_step: InputBatch) -> None:
    def fits(step: InputBatch) -> bool:
        return buckets(step, (256, 2048)) is not None

    assert fits(decode_step)
    assert not fits(table_of(ROWS[-1] + 1, 1, decode_step))
    assert not fits(table_of(3, 2049, decode_step))
    assert not fits(table_of(0, 0, decode_step))
    assert not fits(replace(decode_step, num_scheduled_tokens=np.array([1, 2, 1])))
    piece = EmbeddingSlice((b"hash", 0), 0, 1, 0, 0)
    assert not fits(replace(decode_step, embeddings=(piece,)))


def test_widths_follow_from_the_longest_row(folder: Path) -> None:
    runner = make_runner(folder)
    assert static_of(runner, 32_768).widths == (256, 2048)
    assert static_of(runner, 4096).widths == (256,)
    assert static_of(runner, 100).widths == (7,)


class Recorder:
    """Replaces a kernel and records its grids."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *args, **settings: None


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    made = [Recorder(), Recorder()]
    monkeypatch.setattr(paged_decode, "_paged_decode_kernel", made[0])
    monkeypatch.setattr(paged_decode, "_join_splits_kernel", made[1])
    yield made


def test_grid_depends_only_on_the_bucket(recorders: list[Recorder]) -> None:
    for lengths in ([1, 1, 1, 1], [4096, 17, 256, 1], [1, 2, 3, 4000]):
        rows = torch.arange(5, dtype=torch.int32)
        batch = AttentionBatch(
            num_scheduled_tokens=(1,) * 4,
            host_context_lens=(),
            cu_seqlens_q=rows,
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.zeros((4, 256), dtype=torch.int32),
            slot_mapping=torch.zeros(4, dtype=torch.int64),
            decode_rows=rows[:4],
            chunk_rows=(),
        )
        q, cache = torch.zeros(4, 6, 16), torch.zeros(2, 2, 16, 16)
        paged_decode.paged_decode(q, cache, cache, batch, 1.0, torch.empty_like(q))
    assert set(recorders[0].grids) == {(4, 2, 16)} and len(recorders[0].grids) == 3
    assert set(recorders[1].grids) == {(4, 6)}
