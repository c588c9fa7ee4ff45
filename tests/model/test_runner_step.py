"""The runner's step: chunked = whole, batched = alone, and a bad row that harms no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from octavo.benchmarks.fakes.tiny_checkpoint import SPECIAL_IDS, write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_requests import (
    GREEDY,
    TinyDriver,
    TinyMedia,
    TinyRequest,
    tiny_request,
)
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig, read_json
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner import encode_stage, model_runner
from octavo.engine.runner.kv_cache import activation_bytes, device_memory, kv_block_bytes
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.sampler import NOT_FINITE

NUM_BLOCKS = 64
START, END = SPECIAL_IDS["<|vision_start|>"], SPECIAL_IDS["<|vision_end|>"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_runner(folder: Path, block_size: int = 16) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    dtype, alone = torch.float32, TensorParallel()
    runner = ModelRunner(folder, config, preprocess, CPU, dtype, block_size, alone)
    runner.load()
    runner.allocate(NUM_BLOCKS)
    return runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    return make_runner(folder)


@pytest.mark.lesson("L13")
def test_all_of_the_kv_cache_becomes_resident(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr(model_runner, "make_resident", given.extend)
    runner = make_runner(folder)
    assert sum(each.nbytes for each in given) == NUM_BLOCKS * runner.measure().kv_block_bytes


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def mixed(config: ModelConfig, seed: int = 0, temporal: int = 4, **params: object) -> TinyRequest:
    """Text, an image, a video of several units, text: 60 tokens."""
    parts = [
        text(seed, 5), [START], TinyMedia.random(seed, 84, 112), [END], text(seed + 1, 3),
        [START], TinyMedia.random(seed + 1, 56, 56, frames=14), [END], text(seed + 2, 6),
    ]  # fmt: skip
    return tiny_request(config, parts, replace(GREEDY, **params), temporal)  # type: ignore[arg-type]


def generate(runner: ModelRunner, request: TinyRequest, chunk: int | None = None) -> list[int]:
    runner.embeddings.clear()
    return TinyDriver(runner, NUM_BLOCKS).generate([request], 6, chunk)[0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 17, 31, 59])
def test_l02_mrope_chunk_chunked_is_whole(runner: ModelRunner, chunk: int) -> None:
    whole = generate(runner, mixed(runner.config))
    assert generate(runner, mixed(runner.config), chunk) == whole


@pytest.mark.parametrize("temporal", [1, 2, 3, 7])
def test_a_video_in_smaller_units_is_the_same(runner: ModelRunner, temporal: int) -> None:
    whole = generate(runner, mixed(runner.config))
    request = mixed(runner.config, temporal=temporal)
    driver = TinyDriver(runner, NUM_BLOCKS, max_unit_temporal_patches=temporal)
    runner.embeddings.clear()
    assert driver.generate([request], 6) == [whole]
    assert len(runner.embeddings) == 1 + -(-7 // temporal)


@pytest.mark.parametrize("block_size", [8, 32, 64])
def test_block_size_does_not_matter(folder: Path, runner: ModelRunner, block_size: int) -> None:
    whole = generate(runner, mixed(runner.config))
    assert generate(make_runner(folder, block_size), mixed(runner.config), 13) == whole


@pytest.mark.parametrize("chunk", [None, 9])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_batched_is_alone(runner: ModelRunner, chunk: int | None, temperature: float) -> None:
    def requests() -> list[TinyRequest]:
        return [mixed(runner.config, seed, temperature=temperature) for seed in range(3)]

    alone = [generate(runner, request) for request in requests()]
    runner.embeddings.clear()
    assert TinyDriver(runner, NUM_BLOCKS).generate(requests(), 6, chunk) == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_l03_mrope_delta_preempted_and_resumed_is_the_same(runner: ModelRunner) -> None:
    whole = generate(runner, mixed(runner.config, temperature=1.2))
    request = mixed(runner.config, temperature=1.2)
    runner.embeddings.clear()
    driver = TinyDriver(runner, NUM_BLOCKS)
    driver.generate([request], 3)
    request.num_computed_tokens, request.block_table = 0, []  # recomputed in other blocks
    assert driver.generate([request], 6, chunk=11) == [whole]


def test_l07_mirrored_cache_a_missing_embedding_skips_its_row_alone(runner: ModelRunner) -> None:
    good, bad = mixed(runner.config, 1), mixed(runner.config, 5)
    expected = generate(runner, mixed(runner.config, 1))[0]
    runner.embeddings.clear()
    driver = TinyDriver(runner, NUM_BLOCKS)
    counts = [len(good.token_ids), len(bad.token_ids)]
    batch = driver.build([good, bad], counts)
    lost = bad.units[1].key
    kept = tuple(task for task in batch.encode if task.key != lost)
    result = runner.step(replace(batch, encode=kept))
    assert result.sampled.tolist() == [expected, -1]
    assert result.missing == (lost,)
    assert result.errors == ()
    again = runner.step(replace(batch, encode=tuple(t for t in batch.encode if t.key == lost)))
    assert again.sampled[1] == generate(runner, mixed(runner.config, 5))[0]


def test_dropped_embeddings_are_forgotten_before_encoding(runner: ModelRunner) -> None:
    request = mixed(runner.config)
    driver = TinyDriver(runner, NUM_BLOCKS)
    batch = driver.build([request], [len(request.token_ids)])
    runner.step(batch)
    keys = tuple(unit.key for unit in request.units)
    assert set(runner.embeddings) == set(keys)
    result = runner.step(replace(batch, encode=(), drop=(*keys[:1], (b"unknown", 0))))
    assert result.missing == keys[:1]
    assert runner.step(replace(batch, drop=keys)).missing == ()


def test_l13_leaks_a_kept_embedding_keeps_no_other_alive(runner: ModelRunner) -> None:
    request = mixed(runner.config)
    runner.step(TinyDriver(runner, NUM_BLOCKS).build([request], [len(request.token_ids)]))
    for embedding in runner.embeddings.values():
        assert embedding.untyped_storage().nbytes() == embedding.nbytes


@pytest.mark.parametrize("wrong", [-1, 288, 2**31 - 1])
def test_l16_client_assert_a_token_outside_the_vocabulary_fails_its_row(
    runner: ModelRunner, wrong: int
) -> None:
    good, bad = mixed(runner.config, 1), mixed(runner.config, 5)
    expected = generate(runner, mixed(runner.config, 1))[0]
    bad.token_ids[0] = wrong
    driver = TinyDriver(runner, NUM_BLOCKS)
    result = driver.step([bad, good], [len(bad.token_ids), len(good.token_ids)])
    assert result.sampled.tolist() == [-1, expected]
    assert [row for row, _ in result.errors] == [0]
    assert "vocabulary of size 288" in bad.errors[0]


def test_l01_placeholder_text_more_placeholders_than_embeddings_fail_their_row(
    runner: ModelRunner,
) -> None:
    good, bad = mixed(runner.config, 1), mixed(runner.config, 5)
    expected = generate(runner, mixed(runner.config, 1))[0]
    runner.embeddings.clear()
    batch = TinyDriver(runner, NUM_BLOCKS).build(
        [good, bad], [len(good.token_ids), len(bad.token_ids)]
    )
    pieces = [replace(p, start=p.start + p.row) for p in batch.embeddings]
    result = runner.step(replace(batch, embeddings=tuple(pieces)))
    assert result.sampled.tolist() == [expected, -1]
    assert {row for row, _ in result.errors} == {1}


def test_pixels_that_do_not_fit_their_grid_fail_their_requests_alone(runner: ModelRunner) -> None:
    good, bad = mixed(runner.config, 1), mixed(runner.config, 5)
    expected = generate(runner, mixed(runner.config, 1))[0]
    runner.embeddings.clear()
    driver = TinyDriver(runner, NUM_BLOCKS)
    batch = driver.build([good, bad], [len(good.token_ids), len(bad.token_ids)])
    bad_keys = {unit.key for unit in bad.units[:1]}
    encode = [
        replace(t, pixels=t.pixels[:, :28]) if t.key in bad_keys and t.pixels is not None else t
        for t in batch.encode
    ]
    result = runner.step(replace(batch, encode=tuple(encode)))
    assert result.sampled.tolist() == [expected, -1]
    assert result.errors == ((1, NOT_FINITE),)


def test_a_step_may_only_encode(runner: ModelRunner) -> None:
    request = mixed(runner.config)
    batch = TinyDriver(runner, NUM_BLOCKS).build([request], [len(request.token_ids)])
    none = np.empty(0, np.int32)
    nothing = replace(batch.sampling, rows=none)
    empty = replace(
        batch, token_ids=none, positions=np.empty((3, 0), np.int32), num_scheduled_tokens=none,
        context_lens=none, block_tables=np.empty((0, 0), np.int32), sampling=nothing, embeddings=(),
    )  # fmt: skip
    assert runner.step(empty).sampled.size == 0
    assert len(runner.embeddings) == len(request.units)


def test_arrays_over_message_bytes_are_taken_as_they_come(runner: ModelRunner) -> None:
    """What the wire hands over is read-only."""
    expected = generate(runner, mixed(runner.config))[0]
    request = mixed(runner.config)
    runner.embeddings.clear()
    batch = TinyDriver(runner, NUM_BLOCKS).build([request], [len(request.token_ids)])
    for array in (batch.token_ids, batch.positions, batch.block_tables, batch.context_lens):
        array.setflags(write=False)
    for task in batch.encode:
        assert task.pixels is not None
        task.pixels.setflags(write=False)
    assert runner.step(batch).sampled.tolist() == [expected]


def test_memory_report(runner: ModelRunner) -> None:
    report = runner.measure()
    held = sum(k.nbytes + v.nbytes for k, v in runner.caches)
    assert report.kv_block_bytes * NUM_BLOCKS == held
    assert report.weight_bytes == sum(p.nbytes for p in runner.model.parameters())
    assert 0 < report.free_bytes <= report.total_bytes
    assert (report.dtype, report.device) == ("float32", "cpu")


def real_config(name: str) -> ModelConfig:
    path = Path(__file__).parents[1] / "data" / f"config-{name}.json"
    return ModelConfig.from_dict(read_json(path))


def test_kv_bytes_of_the_real_shapes() -> None:
    """28 layers × 2 × 4 KV heads × 128 × 2 bytes a token for the 7B; 28 ranks replicate its 4."""
    config = real_config("7b")
    assert kv_block_bytes(config, 1, 16, torch.bfloat16) == 16 * 57_344
    assert kv_block_bytes(config, 4, 16, torch.bfloat16) == 16 * 14_336
    assert kv_block_bytes(config, 28, 16, torch.bfloat16) == 16 * 14_336


def test_l08_worst_case_profile_memory_follows_from_the_shapes() -> None:
    config = real_config("2b")
    small, large = (
        activation_bytes(config, 1, 2048, tokens, torch.bfloat16) for tokens in (1024, 16384)
    )
    assert small < large < 4 << 30
    free, total = device_memory(CPU)
    assert 0 < free <= total


def test_a_row_that_awaits_a_token_gets_it_from_the_step_before(runner: ModelRunner) -> None:
    expected = [generate(runner, mixed(runner.config, seed)) for seed in range(2)]
    runner.embeddings.clear()
    rows = [mixed(runner.config, seed) for seed in range(2)]
    driver = TinyDriver(runner, NUM_BLOCKS)
    driver.step(rows, [len(row.token_ids) for row in rows])
    for _ in range(4):
        batch = driver.build(rows, [1, 1])
        blind = replace(batch, token_ids=np.zeros_like(batch.token_ids), awaits=np.array([0, 1]))
        result = runner.step(blind)
        for row, token in zip(rows, result.sampled.tolist(), strict=True):
            row.num_computed_tokens += 1
            row.token_ids.append(token)
    assert [row.output_token_ids for row in rows] == [tokens[:5] for tokens in expected]


def test_a_row_that_awaits_what_was_not_drawn_draws_nothing_and_is_no_error(
    runner: ModelRunner,
) -> None:
    good, bad = mixed(runner.config, 1), mixed(runner.config, 5)
    expected = generate(runner, mixed(runner.config, 1))
    runner.embeddings.clear()
    driver = TinyDriver(runner, NUM_BLOCKS)
    rows = [bad, good]
    batch = driver.build(rows, [len(row.token_ids) for row in rows])
    lost = bad.units[0].key
    first = runner.step(replace(batch, encode=tuple(t for t in batch.encode if t.key != lost)))
    assert first.sampled.tolist() == [-1, expected[0]] and first.missing == (lost,)
    for row in rows:
        row.num_computed_tokens = len(row.token_ids)
        row.token_ids.append(0)
    for token in expected[1:3]:
        result = runner.step(replace(driver.build(rows, [1, 1]), awaits=np.array([0, 1])))
        assert result.sampled.tolist() == [-1, token]
        assert result.missing == () and result.errors == ()
        for row in rows:
            row.num_computed_tokens += 1
            row.token_ids.append(0)


def test_units_that_pass_the_tower_apart_are_the_same(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound on the patches of a pass; a unit that is larger goes alone."""
    runs = []
    for most in (1 << 20, 16, 1):
        monkeypatch.setattr(encode_stage, "CPU_PATCHES", most)
        runner.embeddings.clear()
        tower = mock.Mock(side_effect=runner.model.visual.forward)
        monkeypatch.setattr(runner.model.visual, "forward", tower)
        driver = TinyDriver(runner, NUM_BLOCKS)
        batch = driver.build([mixed(runner.config, 1), mixed(runner.config, 5)], [20, 20])
        runner.step(batch)
        monkeypatch.undo()
        runs.append((tower.call_count, {k: v.clone() for k, v in runner.embeddings.items()}))
    counts = [count for count, _ in runs]
    assert counts[0] == 1 < counts[1] <= counts[2] == len(runs[0][1])
    for _, embeddings in runs[1:]:
        assert all(torch.equal(embeddings[key], each) for key, each in runs[0][1].items())
