"""What sampling settings do, on the real model of a tiny checkpoint: each token is what plain numpy
makes of its logits, and tokens and log probabilities are the same alone, batched, in chunks,
preempted, as a fork, and whether steps overlap or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_engine import TinyEngine
from octavo.benchmarks.fakes.tiny_requests import GREEDY, image, text, tiny_request
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.model_runner import ModelRunner
from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.logprobs import TokenLogprobs
from octavo.scheduler.params import SamplingParams

NUM_BLOCKS, BLOCK_SIZE, NEW_TOKENS = 96, 8, 24
PROMPT = [text(1, 21), *image(1, 84, 56), text(3, 8)]
PLACEHOLDERS = range(22, 28)
BIASED = {5: 4.0, 9: -100.0, 17: 6.5, 40: 3.25}


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


@dataclass(frozen=True)
class Asked:
    """Settings as the scheduler gets them."""

    params: SamplingParams
    stops: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()


def asked(stops: Sequence[int] = (), words: Sequence[Sequence[int]] = (), **more: Any) -> Asked:
    return Asked(replace(GREEDY, **more), frozenset(stops), tuple(map(tuple, words)))


ASKED = {
    "presence": asked(presence_penalty=1.5, logprobs=3),
    "frequency": asked(frequency_penalty=0.7, logprobs=0),
    "minus": asked(frequency_penalty=-0.5, presence_penalty=-2.0),
    "three": asked(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.3),
    "bias": asked(logit_bias=BIASED, logprobs=20),
    "all": asked(
        logit_bias=BIASED, frequency_penalty=0.9, repetition_penalty=1.2, temperature=1.2, seed=4,
        logprobs=5, prompt_logprobs=2,
    ),
    "prompt": asked(prompt_logprobs=20),
}  # fmt: skip


def make_engine(runner: ModelRunner, overlap: bool, **limits: int) -> TinyEngine:
    config = SchedulerConfig(
        block_size=BLOCK_SIZE,
        max_model_len=NUM_BLOCKS * BLOCK_SIZE,
        **{"num_blocks": NUM_BLOCKS, "max_num_seqs": 16, "max_num_batched_tokens": 512,
           "max_encode_tokens": 64, "encoder_cache_tokens": 64, **limits},
    )  # fmt: skip
    return TinyEngine(runner, config, overlap)


def add(engine: TinyEngine, name: str, each: Asked, num_forks: int = 0) -> None:
    tiny = tiny_request(engine.runner.config, PROMPT, each.params)
    more: dict[str, Any] = {"stop_token_ids": each.stops, "bad_words": each.bad_words}
    engine.add(name, tiny, NEW_TOKENS, num_forks, **more)


Told = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs | None]]


def told(engine: TinyEngine, name: str) -> Told:
    request = engine.requests[name]
    return engine.output(name), engine.logprobs.get(name, []), request.prompt_logprobs


def assert_told_the_same(found: Told, expected: Told) -> None:
    assert found[0] == expected[0]
    for some, others in zip(found[1:], expected[1:], strict=True):
        assert len(some) == len(others)
        for one, other in zip(some, others, strict=True):
            if one is None or other is None:
                assert one is other
                continue
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.top_token_ids == other.top_token_ids
            assert list(one.top_logprobs) == pytest.approx(list(other.top_logprobs), abs=1e-4)


@pytest.fixture(scope="module")
def in_turn(runner: ModelRunner) -> dict[str, tuple[Told, list[np.ndarray]]]:
    """Each alone, its prompt whole, a step after the other; and its logits of each token."""
    found = {}
    for name, each in {**ASKED, **wordy(runner)}.items():
        logits: list[np.ndarray] = []
        sample = type(runner)._sample

        def recorded(made: Any, *more: Any, logits: Any = logits, sample: Any = sample) -> Any:
            logits.append(made[0].double().numpy())
            return sample(runner, made, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "_sample", recorded)
            engine = make_engine(runner, overlap=False)
            add(engine, name, each)
            engine.run()
        found[name] = (told(engine, name), logits)
    return found


_PLAIN: list[list[int]] = []


def plain(runner: ModelRunner) -> list[int]:
    if not _PLAIN:
        engine = make_engine(runner, overlap=False)
        add(engine, "plain", asked())
        engine.run()
        _PLAIN.append(engine.output("plain"))
    return _PLAIN[0]


def wordy(runner: ModelRunner) -> dict[str, Asked]:
    """Bad words and stop tokens of what comes else."""
    tokens = plain(runner)
    words = [[tokens[2]], tokens[4:6], tokens[7:10], [*tokens[9:11], 3], [tokens[0]] * 2]
    return {
        "words": asked(words=words, logprobs=1),
        "early": asked(stops=tokens[1:6], min_tokens=9),
        "late": asked(stops=tokens[1:6], min_tokens=9, words=words, presence_penalty=0.3),
    }


NAMES = [*ASKED, "words", "early", "late"]


def numpy_scores(logits: np.ndarray, prompt: list[int], output: list[int], each: Asked) -> Any:
    """The logits after all that is done to them before temperature, in the plainest way."""
    params, scores = each.params, logits.copy()
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(output):
        scores[token] -= params.presence_penalty
        scores[token] -= params.frequency_penalty * output.count(token)
    for token, bias in params.biases:
        scores[token] += bias
    if len(output) < params.min_tokens:
        scores[list(each.stops)] = -np.inf
    for *before, last in each.bad_words:
        if len(output) >= len(before) and output[len(output) - len(before) :] == before:
            scores[last] = -np.inf
    return scores


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_that_numpy_chooses(
    runner: ModelRunner, in_turn: dict[str, Any], name: str
) -> None:
    each = {**ASKED, **wordy(runner)}[name]
    (tokens, logprobs, _), logits = in_turn[name]
    prompt = tiny_request(runner.config, PROMPT).token_ids
    banned = list(runner.config.vision_token_ids)
    for index, token in enumerate(tokens):
        scores = numpy_scores(logits[index], prompt, tokens[:index], each)
        scores[banned] = -np.inf
        if each.params.temperature == 0:
            assert token == scores.argmax()
        raw = logits[index] - logits[index].max()
        raw -= np.log(np.exp(raw).sum())
        if each.params.logprobs is not None:
            entry = logprobs[index]
            assert (entry.token_id, len(entry.top)) == (token, each.params.logprobs)
            assert entry.logprob == pytest.approx(raw[token], abs=1e-5)
            ranked = (-raw).argsort(kind="stable")[: each.params.logprobs]
            assert list(entry.top_token_ids) == ranked.tolist()
            assert list(entry.top_logprobs) == pytest.approx(raw[ranked].tolist(), abs=1e-5)
    assert bool(logprobs) == (each.params.logprobs is not None)


def test_each_setting_changes_something(runner: ModelRunner, in_turn: dict[str, Any]) -> None:
    for name in NAMES:
        tokens = in_turn[name][0][0]
        assert (tokens == plain(runner)) == (name == "prompt"), name
    early = in_turn["early"][0][0]
    assert 9 < len(early) <= NEW_TOKENS or early[-1] not in wordy(runner)["early"].stops
    words = in_turn["words"][0][0]
    for word in wordy(runner)["words"].bad_words:
        assert not any(tuple(words[i : i + len(word)]) == word for i in range(len(words)))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("budget", [512, 7])
def test_alone_is_batched_and_chunked(
    runner: ModelRunner, in_turn: dict[str, Any], overlap: bool, budget: int
) -> None:
    engine = make_engine(runner, overlap, max_num_batched_tokens=budget)
    everyone = {**ASKED, **wordy(runner)}
    for name, each in everyone.items():
        add(engine, name, each)
    engine.run()
    for name in everyone:
        assert_told_the_same(told(engine, name), in_turn[name][0])


@pytest.mark.parametrize("found_again", [True, False])
@pytest.mark.parametrize("name", ["all", "three", "late", "words"])
def test_alone_is_preempted_at_each_step(
    runner: ModelRunner, in_turn: dict[str, Any], name: str, found_again: bool
) -> None:
    each = {**ASKED, **wordy(runner)}[name]
    for at in range(1, 16, 2):
        engine = make_engine(runner, True, max_num_batched_tokens=9)
        add(engine, name, each)
        for _ in range(at):
            engine.step()
        request = engine.requests[name]
        if not request.status.is_finished:
            if not found_again:
                engine.scheduler.state.blocks.forget(request.block_table)
            engine.scheduler.state.preempt(request)
        engine.receive()
        engine.run()
        assert request.num_preemptions == 1
        assert_told_the_same(told(engine, name), in_turn[name][0])


def test_forks_count_each_their_own_output(runner: ModelRunner, in_turn: dict[str, Any]) -> None:
    """And the prompt's log probabilities are told once."""
    each = ASKED["all"]
    engine = make_engine(runner, True, max_num_batched_tokens=11)
    add(engine, "all", each, num_forks=2)
    engine.run()
    assert_told_the_same(told(engine, "all"), in_turn["all"][0])
    for index in (1, 2):
        lone = make_engine(runner, False)
        seeded = replace(each, params=replace(each.params, seed=4 + index, prompt_logprobs=None))
        add(lone, "alone", seeded)
        lone.run()
        assert_told_the_same(told(engine, f"all[{index}]"), told(lone, "alone"))
    assert engine.requests["all[1]"].num_cached_tokens > 0


@pytest.mark.parametrize("budget", [512, 7])
def test_prompt_logprobs_pass_by_what_is_cached(
    runner: ModelRunner, in_turn: dict[str, Any], budget: int
) -> None:
    engine = make_engine(runner, True, max_num_batched_tokens=budget)
    for name in ("first", "second"):
        add(engine, name, ASKED["prompt"])
        engine.run()
        assert engine.requests[name].num_cached_tokens == 0
        assert_told_the_same(told(engine, name), in_turn["prompt"][0])
    add(engine, "plain", asked())
    engine.run()
    assert engine.requests["plain"].num_cached_tokens > 0


def test_prompt_logprobs_are_those_of_the_same_tokens_drawn(runner: ModelRunner) -> None:
    """What a prompt's end is told of is what the output was told of when it was drawn."""
    tiny = tiny_request(runner.config, PROMPT, replace(GREEDY, logprobs=6))
    engine = make_engine(runner, True)
    engine.add("drawn", tiny, NEW_TOKENS)
    engine.run()
    longer = [*PROMPT, engine.output("drawn")]
    params = replace(GREEDY, prompt_logprobs=6)
    engine.add("given", tiny_request(runner.config, longer, params), 1)
    engine.run()
    found = engine.requests["given"].prompt_logprobs
    size = len(tiny.token_ids)
    assert len(found) == size + NEW_TOKENS
    nothing = [index for index, entry in enumerate(found) if entry is None]
    assert nothing == [0, *PLACEHOLDERS]
    output = engine.output("drawn")
    assert_told_the_same((output, found[size:], []), (output, engine.logprobs["drawn"], []))
