"""The step format: what is packed comes out equal, and what does not fit is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from octavo.engine.errors import InputError
from octavo.engine.runner.batch import (
    BatchResult,
    EmbeddingSlice,
    EncodeTask,
    InputBatch,
    LogitEdits,
    Logprobs,
    PromptTargets,
    SamplingBatch,
    TokenMasks,
)
from octavo.engine.worker import wire

MORE: dict[str, Any] = {
    "presence_penalty": np.array([0.5, 0.0], np.float32),
    "frequency_penalty": np.array([-2.0, 0.0], np.float32),
    "edits": LogitEdits(
        *(np.array(ids, np.int32) for ids in ([0, 1, 1], [-1, 5, -1], [9, 8, 7])),
        np.array([-np.inf, 3.5, 0.0], np.float32),
    ),
    "logprob_places": np.array([0, 1], np.int32),
    "masks": TokenMasks(np.array([1], np.int32), np.array([[-1, 5, 1 << 30]], np.int32)),
    "prompt_targets": PromptTargets(np.array([0, 2, 3], np.int32), np.array([7, 6, 5], np.int32)),
}


def make_batch(**more: Any) -> InputBatch:
    rng = np.random.default_rng(0)
    sampling = SamplingBatch(
        rows=np.array([0, 2], np.int32),
        temperature=np.array([0.0, 0.7], np.float32),
        top_k=np.array([0, 5], np.int32),
        top_p=np.array([1.0, 0.9], np.float32),
        min_p=np.array([0.0, 0.1], np.float32),
        repetition_penalty=np.array([1.0, 1.2], np.float32),
        seed=np.array([1, 2**63 + 5], np.uint64),
        output_index=np.array([0, 9], np.int32),
        slots=np.array([-1, 4], np.int32),
        seen_token_ids=(np.empty(0, np.int32), np.array([4, 5, 6], np.int32)),
        **more,
    )
    pixels = rng.integers(0, 256, (2, 28, 56, 3), dtype=np.uint8)
    return InputBatch(
        token_ids=np.arange(6, dtype=np.int32),
        positions=rng.integers(0, 99, (3, 6)).astype(np.int32),
        num_scheduled_tokens=np.array([1, 3, 2], np.int32),
        context_lens=np.array([7, 3, 8], np.int32),
        block_tables=rng.integers(0, 9, (3, 4)).astype(np.int32),
        sampling=sampling,
        awaits=np.array([1, -1, -1], np.int32),
        copies=np.array([[4, 5, 5], [6, 7, 8]], np.int32),
        encode=(EncodeTask((b"h" * 32, 1), (1, 2, 4), 1, pixels),),
        embeddings=(EmbeddingSlice((b"h" * 32, 1), 2, 3, 1, 1),),
        drop=((b"g" * 32, 0),),
    )


def assert_same(left: object, right: object) -> None:
    if dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("more", [{}, MORE], ids=["plain", "all"])
def test_a_step_comes_out_as_it_went_in(more: dict[str, Any]) -> None:
    batch = make_batch(**more)
    _, second = wire.pack_steps(batch, epoch=3, step_id=11, previous_step_id=9, num_ranks=2)
    decoded = type(second).FromString(second.SerializeToString())
    assert (decoded.epoch, decoded.step_id, decoded.previous_step_id) == (3, 11, 9)
    assert_same(batch, wire.unpack_step(decoded))


def test_pixels_go_to_the_rank_that_encodes_alone() -> None:
    first, second = wire.pack_steps(
        make_batch(), epoch=1, step_id=1, previous_step_id=0, num_ranks=2
    )
    assert not first.encode[0].pixels and second.encode[0].pixels
    assert wire.unpack_step(first).encode[0].pixels is None


def test_embeddings_go_to_one_rank_alone() -> None:
    """Bit by bit; the others get it from that one, as they get what the tower makes."""
    key, grid = (b"h" * 32, 1), (1, 4, 6)
    numbers = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    for embeds in (numbers[6:], np.asfortranarray(numbers)[:6]):
        task = EncodeTask(key, grid, 1, None, embeds)
        batch = dataclasses.replace(make_batch(), encode=(task,))
        requests = wire.pack_steps(batch, epoch=1, step_id=1, previous_step_id=0, num_ranks=2)
        first, second = (type(r).FromString(r.SerializeToString()) for r in requests)
        assert_same(batch, wire.unpack_step(second))
        assert first.encode[0].ByteSize() < 64
        assert wire.unpack_step(first).encode == (EncodeTask(key, grid, 1, None),)
        second.encode[0].embeds = second.encode[0].embeds[:-4]
        with pytest.raises(wire.WireError):
            wire.unpack_step(second)


def test_a_result_comes_out_as_it_went_in() -> None:
    rng = np.random.default_rng(0)
    found = [
        Logprobs(
            np.arange(size, dtype=np.int32),
            rng.random(size).astype(np.float32),
            rng.integers(0, 99, (size, 4)).astype(np.int32),
            rng.random((size, 4)).astype(np.float32),
        )
        for size in (2, 5)
    ]
    result = BatchResult(
        np.array([5, -1], np.int32),
        ((b"x" * 32, 2),),
        ((1, InputError("structured", "bad row").reason),),
    )
    assert_same(result, wire.unpack_results([wire.pack_result(result, 1, 2)]))
    result = dataclasses.replace(result, logprobs=found[0], prompt_logprobs=found[1])
    assert_same(result, wire.unpack_results([wire.pack_result(result, 1, 2)]))


def test_what_one_rank_lacks_all_lack() -> None:
    sampled = np.array([5, 6], np.int32)
    first, second = (b"x" * 32, 2), (b"y" * 32, 0)
    results = [BatchResult(sampled, (first,)), BatchResult(sampled, (second, first))]
    joined = wire.unpack_results([wire.pack_result(result, 1, 2) for result in results])
    assert joined.missing == (first, second)
    assert joined.sampled.tolist() == [5, 6]


@pytest.mark.parametrize("field", ["positions", "context_lens", "num_scheduled_tokens"])
def test_arrays_that_do_not_fit_are_rejected(field: str) -> None:
    (request,) = wire.pack_steps(make_batch(), epoch=1, step_id=1, previous_step_id=0, num_ranks=1)
    setattr(request, field, getattr(request, field)[:-4])
    with pytest.raises(wire.WireError):
        wire.unpack_step(request)


def test_an_empty_step_travels() -> None:
    none = np.empty(0, np.int32)
    batch = InputBatch(
        none,
        np.empty((3, 0), np.int32),
        none,
        none,
        np.empty((0, 0), np.int32),
        wire.empty_sampling(),
        none,
    )
    (request,) = wire.pack_steps(batch, epoch=1, step_id=1, previous_step_id=0, num_ranks=1)
    assert wire.unpack_step(request).block_tables.shape == (0, 0)
