"""The sampler against transformers' processors, and its draws against the probabilities."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from octavo.engine.runner.batch import LogitEdits, SamplingBatch
from octavo.engine.runner.logprobs import token_logprobs
from octavo.engine.runner.sampler import Sampler, SeenTokens, filter_scores, gumbel, row_keys

VOCAB = 50


def sampling(count: int, **values: object) -> SamplingBatch:
    """`count` rows alike, but for what `values` says; a list is one value a row."""
    fields = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "repetition_penalty": (1.0, np.float32),
        "seed": (0, np.uint64),
        "output_index": (0, np.int32),
    }
    arrays = {
        name: np.broadcast_to(np.asarray(values.get(name, default), kind), count).copy()
        for name, (default, kind) in fields.items()
    }
    seen = values.get("seen", [()] * count)
    penalized = arrays["repetition_penalty"] != 1
    return SamplingBatch(
        rows=np.arange(count, dtype=np.int32),
        slots=np.where(penalized, np.arange(count), -1).astype(np.int32),
        seen_token_ids=tuple(np.array(ids, np.int32) for ids in seen),  # type: ignore[attr-defined]
        **arrays,
    )


def sample(
    logits: torch.Tensor, batch: SamplingBatch, banned: tuple[int, ...] = ()
) -> torch.Tensor:
    """With slots that are empty; a row's last token is the last that it has seen."""
    last = [int(seen[-1]) if seen.size else 0 for seen in batch.seen_token_ids]
    seen = SeenTokens(logits.shape[1], logits.device)
    return Sampler(banned, seen).sample(logits, batch, torch.tensor(last))


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


FILTERS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (7, 0.6, 0.05), (1, 0.9, 0),
           (VOCAB + 9, 0.999, 0.0), (3, 1e-3, 0.5)]  # fmt: skip


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_filters_keep_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    scores = random_logits(20)
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(warpers)(torch.zeros(20, 1, dtype=torch.long), scores.clone())
    alike = (np.full(20, top_k, np.int32), *(np.full(20, p, np.float32) for p in (top_p, min_p)))
    found = filter_scores(scores, *alike)
    assert torch.equal(found, expected)


def test_rows_of_a_batch_are_filtered_each_by_its_own_settings() -> None:
    scores = random_logits(len(FILTERS))
    top_k, top_p, min_p = (np.array(column) for column in zip(*FILTERS, strict=True))
    together = filter_scores(scores, top_k, top_p.astype(np.float32), min_p.astype(np.float32))
    for row in range(len(FILTERS)):
        one = slice(row, row + 1)
        settings = top_k[one], top_p[one].astype(np.float32), min_p[one].astype(np.float32)
        assert torch.equal(filter_scores(scores[one], *settings), together[one])


def test_tokens_of_equal_logit_share_one_fate() -> None:
    scores = torch.tensor([[2.0, 1.0, 2.0, 1.0, 0.0]])
    kept = filter_scores(scores, np.array([3]), np.ones(1, np.float32), np.zeros(1, np.float32))
    assert torch.isfinite(kept).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_greedy_with_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(40)
    seen = torch.randint(0, VOCAB, (40, 30), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()).argmax(-1)
    batch = sampling(40, temperature=0, repetition_penalty=penalty, seen=seen.tolist())
    assert torch.equal(sample(logits, batch), expected)
    assert not torch.equal(expected, logits.argmax(-1))


def test_penalty_leaves_other_rows_and_the_given_logits_alone() -> None:
    logits = random_logits(3)
    before = logits.clone()
    batch = sampling(3, temperature=0, repetition_penalty=[1, 50, 1], seen=[(), range(50), ()])
    sample(logits, batch, (int(logits[0].argmax()),))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_l01_placeholder_text_vision_tokens_are_never_sampled(temperature: float) -> None:
    logits = torch.full((64, 6), -20.0)
    logits[:, [1, 4]] = 90.0
    batch = sampling(64, temperature=temperature, seed=range(64))
    drawn = sample(logits, batch, (1, 4))
    assert not set(drawn.tolist()) & {1, 4}


def test_a_row_that_is_not_finite_is_reported_and_the_others_go_on() -> None:
    logits = random_logits(4)
    logits[1, 3], logits[2, 0] = torch.nan, torch.inf
    for temperature in (0.0, 0.7):
        found = sample(logits, sampling(4, temperature=temperature)).tolist()
        assert found[1] == found[2] == -1
        assert found[0] >= 0
        assert found[3] >= 0


def test_temperature_near_zero_is_greedy() -> None:
    logits = random_logits(8)
    assert torch.equal(sample(logits, sampling(8, temperature=1e-30)), logits.argmax(-1))


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    possible = expected > 0
    return float(((counts - expected) ** 2)[possible] @ (1 / expected[possible]))


@pytest.mark.parametrize("by", ["seed", "output_index"])
def test_draws_follow_the_probabilities(by: str) -> None:
    draws = 20_000
    logits = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.5, -2.0, 1.0, -0.5])
    batch = sampling(draws, temperature=1.3, **{by: np.arange(draws)})
    drawn = sample(logits.expand(draws, -1), batch)
    counts = np.bincount(drawn.numpy(), minlength=8)
    probabilities = (logits / 1.3).softmax(-1).numpy()
    assert chi_square(counts, probabilities) < 24.3  # 7 degrees of freedom, p = 0.001


def test_filtered_draws_follow_the_probabilities_that_transformers_leaves() -> None:
    draws = 10_000
    logits = random_logits(1, seed=5, vocab=30)
    chain = [TemperatureLogitsWarper(1.5), TopKLogitsWarper(9), TopPLogitsWarper(0.9)]
    left = LogitsProcessorList(chain)(torch.zeros(1, 1, dtype=torch.long), logits.clone())
    probabilities = left.softmax(-1)[0].double().numpy()
    batch = sampling(draws, temperature=1.5, top_k=9, top_p=0.9, seed=np.arange(draws))
    counts = np.bincount(sample(logits.expand(draws, -1), batch), minlength=30)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square(counts, probabilities) < 26.1  # at most 8 degrees of freedom, p = 0.001


def test_a_draw_depends_on_its_row_alone() -> None:
    """The same whatever is beside it: company, order and the others' filters."""
    logits = random_logits(40)
    settings = {
        "temperature": np.linspace(0.5, 3, 40), "seed": np.arange(40) * 2**40,
        "output_index": np.arange(40), "top_k": [0, 6, 3, 0] * 10, "top_p": [1, 1, 0.9, 0.7] * 10,
    }  # fmt: skip
    together = sample(logits, sampling(40, **settings))
    for row in range(40):
        own = {name: values[row] for name, values in settings.items()}
        alone = sample(logits[row : row + 1], sampling(1, **own))
        assert alone[0] == together[row]


def test_neighbouring_seeds_and_indices_are_unrelated() -> None:
    seeds, indices = np.meshgrid(np.arange(60, dtype=np.uint64), np.arange(60, dtype=np.int32))
    keys = row_keys(seeds.ravel(), indices.ravel())
    assert len(set(keys.tolist())) == 3600
    ids = torch.arange(16).expand(3600, -1)
    noise = gumbel(torch.from_numpy(keys.view(np.int64)), ids).reshape(60, 60, 16).numpy()
    for axis in range(3):
        first, second = np.take(noise, range(15), axis), np.take(noise, range(1, 16), axis)
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.05


def test_the_hash_is_splitmix64() -> None:
    """Recorded values: a draw must be the same in every release and on every device."""

    def reference(key: int, token: int) -> float:
        mask = (1 << 64) - 1
        x = (key + (token + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        return float(-np.log(-np.log(((x >> 12) + 0.5) * 2.0**-52)))

    keys = [0, 1, 2**63 + 17, 2**64 - 1]
    found = gumbel(
        torch.from_numpy(np.array(keys, np.uint64).view(np.int64)),
        torch.tensor([[0, 151_935]]).expand(4, -1),
    )
    for row, key in enumerate(keys):
        assert found[row].tolist() == pytest.approx([reference(key, 0), reference(key, 151_935)])


def test_a_row_whose_every_token_is_forbidden_ends_nothing() -> None:
    """It draws something; the others are as if alone."""
    logits = random_logits(2)
    edits = LogitEdits(
        np.zeros(VOCAB, np.int32), np.full(VOCAB, -1, np.int32), np.arange(VOCAB, dtype=np.int32),
        np.full(VOCAB, -np.inf, np.float32),
    )  # fmt: skip
    for more in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0}):
        batch = sampling(2, seed=3, **more)
        alone = sample(logits[1:], sampling(1, seed=3, **more))
        found = sample(logits, dataclasses.replace(batch, edits=edits))
        assert 0 <= found[0] < VOCAB and found[1] == alone[0]


def test_counts_are_of_the_output_and_of_who_has_the_slot_now() -> None:
    """Against a plain count, over steps; a slot that another takes begins anew."""
    rng = np.random.default_rng(0)
    seen = SeenTokens(VOCAB, torch.device("cpu"))
    histories: dict[int, list[int]] = {}
    starts: dict[int, int] = {}
    for _ in range(60):
        slots = rng.choice(9, rng.integers(1, 9), replace=False)
        fill = []
        for slot in slots.tolist():
            if slot not in histories or rng.random() < 0.2:  # another's, or its own once more
                starts[slot] = int(rng.integers(1, 9))
                length = starts[slot] + int(rng.integers(0, 9))
                histories[slot] = rng.integers(0, VOCAB, length).tolist()
                fill.append(np.array([*histories[slot][:-1], -1], np.int32))
            else:
                histories[slot].append(int(rng.integers(0, VOCAB)))
                fill.append(np.empty(0, np.int32))
        last = torch.tensor([histories[slot][-1] for slot in slots.tolist()])
        index = np.array([len(histories[s]) - starts[s] for s in slots.tolist()], np.int32)
        counts = seen.counts(slots.astype(np.int32), fill, last, index)
        flags = seen.flags(slots.astype(np.int32), fill, last)
        for row, slot in enumerate(slots.tolist()):
            output = histories[slot][starts[slot] :]
            assert counts[row].tolist() == np.bincount(output, minlength=VOCAB).tolist()
            assert set(np.flatnonzero(flags[row])) == set(histories[slot])


def test_log_probabilities_of_a_row_do_not_depend_on_its_place() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 30] = 1.0
    found = token_logprobs(logits, torch.tensor([30, 7, -1]), np.arange(3, dtype=np.int32))
    assert found.top_token_ids.shape == (3, 20)
    total = np.log(np.e + VOCAB - 1)
    assert found.chosen[:2].tolist() == pytest.approx([1 - total, -total])
    assert torch.equal(found.top_token_ids[0], found.top_token_ids[1])
    assert found.top[0].tolist() == pytest.approx([1 - total, *[-total] * 19])
