"""Core equalities, with the real model on a tiny random checkpoint in float32.

A request's tokens are the same alone, batched, in chunks of every size, preempted at each step,
with a prefix cache hit, and as one of several forks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_engine import TinyEngine
from octavo.benchmarks.fakes.tiny_requests import (
    GREEDY,
    TinyDriver,
    TinyRequest,
    image,
    text,
    tiny_request,
    video,
)
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.model_runner import ModelRunner
from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.params import SamplingParams

NUM_BLOCKS, BLOCK_SIZE, NEW_TOKENS = 96, 8, 7


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tied=False, vocab_size=283)
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    device, alone = torch.device("cpu"), TensorParallel()
    made = ModelRunner(folder, config, preprocess, device, torch.float32, BLOCK_SIZE, alone)
    made.load()
    made.allocate(NUM_BLOCKS)
    return made


PROMPTS = {
    "text": [text(1, 40)],
    "image": [text(2, 9), *image(1, 84, 140), text(3, 8)],
    "images": [text(4, 3), *image(2, 56, 56), text(5, 2), *image(3, 28, 112), *image(2, 56, 56)],
    "video": [text(7, 4), *video(5, 12, 56, 84), text(8, 6)],
    "both": [text(9, 4), *image(6, 56, 84), text(1, 3), *video(7, 8, 56, 28), text(2, 5)],
}
SAMPLED = replace(GREEDY, temperature=1.3, repetition_penalty=1.3, seed=11)


def prompt(
    runner: ModelRunner, name: str, params: SamplingParams = GREEDY, extra: int = 0
) -> TinyRequest:
    """Build a prompt; `extra` tokens at its end let two prompts differ only in their ends."""
    parts = [*PROMPTS[name], *([text(100 + extra, extra)] if extra else [])]
    return tiny_request(runner.config, parts, params, max_unit_temporal_patches=2)


def make_engine(runner: ModelRunner, overlap: bool = True, **settings: int) -> TinyEngine:
    limits = {
        "num_blocks": NUM_BLOCKS,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_encode_tokens": 64,
        "encoder_cache_tokens": 64,
        **settings,
    }
    config = SchedulerConfig(block_size=BLOCK_SIZE, max_model_len=NUM_BLOCKS * BLOCK_SIZE, **limits)
    return TinyEngine(runner, config, overlap)


def alone(runner: ModelRunner, name: str, params: SamplingParams = GREEDY) -> list[int]:
    """Generate with the plain driver, without a scheduler."""
    runner.embeddings.clear()
    driver = TinyDriver(runner, NUM_BLOCKS, max_unit_temporal_patches=2)
    return driver.generate([prompt(runner, name, params)], NEW_TOKENS)[0]


@pytest.fixture(scope="module")
def expected(runner: ModelRunner) -> dict[str, list[int]]:
    found = {name: alone(runner, name) for name in PROMPTS}
    assert all(len(set(tokens)) > 3 for tokens in found.values())  # not a model that repeats itself
    return found


@pytest.mark.parametrize("name", PROMPTS)
def test_batched_equals_alone(
    runner: ModelRunner, expected: dict[str, list[int]], name: str
) -> None:
    engine = make_engine(runner)
    for each in PROMPTS:
        engine.add(each, prompt(runner, each), NEW_TOKENS)
    engine.add("again", prompt(runner, name), NEW_TOKENS)
    engine.run()
    assert {each: engine.output(each) for each in PROMPTS} == expected
    assert engine.output("again") == expected[name]


@pytest.mark.lesson("L02")
@pytest.mark.parametrize("name", PROMPTS)
def test_mrope_chunk_every_chunk_size_equals_alone(
    runner: ModelRunner, expected: dict[str, list[int]], name: str
) -> None:
    """Encode units are still encoded as a whole."""
    tiny = prompt(runner, name)
    for size in range(1, len(tiny.token_ids) + 1):
        engine = make_engine(runner, max_num_batched_tokens=size, encoder_cache_tokens=20)
        engine.add(name, prompt(runner, name), NEW_TOKENS)
        engine.run()
        assert engine.output(name) == expected[name], f"in chunks of {size}"
        assert engine.num_encoded >= len({unit.key for unit in tiny.units})


@pytest.mark.lesson("L03")
@pytest.mark.parametrize("found_again", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
def test_mrope_delta_preempted_at_each_step_equals_alone(
    runner: ModelRunner, expected: dict[str, list[int]], name: str, found_again: bool
) -> None:
    """Resume from the prefix cache, and with all blocks and embeddings lost."""
    num_steps = -(-len(prompt(runner, name).token_ids) // 13) + NEW_TOKENS - 1
    for at in range(1, num_steps):
        engine = make_engine(runner, max_num_batched_tokens=13)
        engine.add(name, prompt(runner, name), NEW_TOKENS)
        for _ in range(at):
            engine.step()
        request, state = engine.requests[name], engine.scheduler.state
        computed = request.num_computed_tokens
        if not found_again:
            state.blocks.forget(request.block_table)
        state.preempt(request)
        if not found_again:
            for unit in request.units:
                state.encoder_cache.lose(unit.key)
            runner.embeddings.clear()
        engine.receive()  # a step that was in flight at preemption; its token still counts
        plan = engine.step()
        assert plan is not None
        assert plan.num_computed_tokens[0] == (
            computed // BLOCK_SIZE * BLOCK_SIZE if found_again else 0
        )
        engine.run()
        assert engine.output(name) == expected[name], f"preempted after step {at}"


@pytest.mark.lesson("L03")
@pytest.mark.parametrize("name", PROMPTS)
def test_mrope_delta_prefix_cache_hit_equals_alone(
    runner: ModelRunner, expected: dict[str, list[int]], name: str
) -> None:
    """Use hits of every length, including those that end within an image or video.

    Media covered by a hit are not encoded.
    """
    size = len(prompt(runner, name).token_ids)
    for num_blocks in range(size // BLOCK_SIZE + 1):
        engine = make_engine(runner)
        engine.add("first", prompt(runner, name), NEW_TOKENS)
        engine.run()
        assert engine.output("first") == expected[name]
        first, blocks = engine.requests["first"], engine.scheduler.blocks
        for block_hash in first.block_hashes[num_blocks:]:
            block = blocks.find(block_hash)
            assert block is not None
            blocks.forget([block])
        for unit in first.units:
            engine.scheduler.encoder_cache.lose(unit.key)
        runner.embeddings.clear()
        engine.num_encoded = 0
        engine.add("second", prompt(runner, name), NEW_TOKENS)
        engine.run()
        cached = min(num_blocks * BLOCK_SIZE, size - 1)
        assert engine.requests["second"].num_cached_tokens == cached
        assert engine.output("second") == expected[name], f"{num_blocks} blocks found"
        uncovered = {unit.key for unit in first.units if unit.end > cached}
        assert engine.num_encoded == len(uncovered)


@pytest.mark.lesson("L03")
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", PROMPTS)
def test_mrope_delta_each_of_n_forks_equals_alone(
    runner: ModelRunner, name: str, params: SamplingParams
) -> None:
    seeds = [(params.seed or 0) + i for i in range(4)]
    lone = [alone(runner, name, replace(params, seed=seed)) for seed in seeds]
    for budget in (512, 11):
        engine = make_engine(runner, max_num_batched_tokens=budget)
        engine.add("a", prompt(runner, name, params), NEW_TOKENS, num_forks=3)
        engine.run()
        assert [engine.output(each) for each in ("a", "a[1]", "a[2]", "a[3]")] == lone
    assert len({tuple(tokens) for tokens in lone}) == (1 if params is GREEDY else 4)


@pytest.mark.parametrize("budget", [512, 13])
def test_penalties_see_the_token_history_on_workers(runner: ModelRunner, budget: int) -> None:
    """The penalty is so strong that no token repeats; the driver resends the history each time."""
    strong = replace(GREEDY, repetition_penalty=50.0)
    for overlap in (True, False):
        engine = make_engine(runner, overlap, max_num_batched_tokens=budget)
        for name in PROMPTS:
            engine.add(name, prompt(runner, name, strong), 20)
        for _ in range(9):
            engine.step()
        engine.scheduler.state.preempt(engine.requests["image"])
        engine.receive()
        engine.run()
        for name in PROMPTS:
            runner.embeddings.clear()
            driver = TinyDriver(runner, NUM_BLOCKS, max_unit_temporal_patches=2)
            (alone_,) = driver.generate([prompt(runner, name, strong)], 20)
            assert engine.output(name) == alone_
            assert len(set(alone_)) == 20


@pytest.mark.parametrize("seed", range(6))
def test_random_mix_equals_alone(
    runner: ModelRunner, expected: dict[str, list[int]], seed: int
) -> None:
    """Mix shared prefixes, forks, tight memory, small chunks and priorities."""
    rng = random.Random(seed)
    sampled = {name: alone(runner, name, SAMPLED) for name in PROMPTS}
    engine = make_engine(
        runner,
        overlap=seed > 1,
        num_blocks=rng.choice([18, 24]),
        max_num_seqs=rng.choice([2, 3]),
        max_num_batched_tokens=rng.choice([9, 30, 200]),
        max_encode_tokens=rng.choice([16, 40]),
        encoder_cache_tokens=rng.choice([16, 40]),
        max_num_partial_prefills=rng.choice([1, 3]),
        long_prefill_token_threshold=rng.choice([5, 100]),
    )
    wanted: dict[str, list[int]] = {}
    for number in range(24):
        name, params = rng.choice(list(PROMPTS)), rng.choice([GREEDY, SAMPLED])
        extra = rng.choice([0, 0, 0, 5])  # requests with extra tokens have no expected output
        tiny = prompt(runner, name, params, extra)
        forks, priority = rng.choice([0, 0, 2]), rng.choice([0, 9, 9])
        engine.add(f"{number}", tiny, NEW_TOKENS, forks, priority)
        if not extra:
            wanted[f"{number}"] = (expected if params is GREEDY else sampled)[name]
        for _ in range(rng.choice([1, 2, 4])):
            engine.step()
    engine.run()
    assert {name: engine.output(name) for name in wanted} == wanted
    requests = engine.requests.values()
    assert sum(request.num_preemptions for request in requests) > 0
    assert sum(request.num_cached_tokens for request in requests) > 0
