"""A step plan becomes arrays: positions, embeddings and pixels are the whole prompt's, cut."""

import dataclasses
from array import array
from typing import Any

import numpy as np
import pytest

from octavo.engine.core.batch_builder import build_batch
from octavo.engine.core.penalty_slots import SamplingSlots
from octavo.engine.media.item import UnitContent
from octavo.engine.runner.batch import InputBatch
from octavo.engine.worker.watch import work_of
from octavo.scheduler.params import SamplingParams
from octavo.scheduler.request import MediaSpan, Request, UnitKey
from octavo.scheduler.step import EncodePlan, StepPlan

GREEDY = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=7
)
Units = dict[UnitKey, UnitContent]


def make_request(params: SamplingParams = GREEDY) -> tuple[Request, Units]:
    """30 tokens: text, an image of 6 tokens at 4, text, a video of 5 × 2 tokens at 14, text."""
    spans = [MediaSpan(4, 6, (1, 4, 6)), MediaSpan(14, 10, (5, 2, 4))]
    sizes = [(1, 56, 84), (4, 28, 56), (4, 28, 56), (2, 28, 56)]
    contents = [
        UnitContent(
            bytes([i]) * 32, (-(-n // 2), h // 14, w // 14), np.zeros((n, h, w, 3), np.uint8)
        )
        for i, (n, h, w) in enumerate(sizes)
    ]
    positions = np.random.default_rng(0).integers(0, 99, (3, 30)).astype(np.int32)
    request = Request(
        request_id="a",
        prompt_token_ids=array("i", range(100, 130)),
        params=params,
        units=tuple(unit for span in spans for unit in span.units(2)),
        mrope_positions=tuple(array("i", axis.tolist()) for axis in positions),
        mrope_position_delta=-11,
    )
    request.block_table = array("i", [3, 1, 2])
    request.supply([content.media_hash for content in contents])
    return request, dict(zip((unit.key for unit in request.units), contents, strict=True))


def plan_for(request: Request, start: int, count: int, **more: Any) -> StepPlan:
    return StepPlan(
        step_id=1,
        request_ids=("a",),
        num_computed_tokens=(start,),
        num_scheduled_tokens=(count,),
        block_tables=(request.block_table,),
        samples=(start + count == request.num_tokens,),
        **more,
    )


def build(plan: StepPlan, request: Request, pixels: Any = None, num_ranks: int = 1) -> InputBatch:
    slots = SamplingSlots()
    return build_batch(plan, {"a": request}, {"a": pixels}, slots, num_ranks)


@pytest.mark.lesson("L02")
@pytest.mark.parametrize("size", [1, 3, 7, 30])
def test_mrope_chunk_slices_are_the_whole(size: int) -> None:
    request, _ = make_request()
    request.token_ids.extend([7, 8])
    parts = [build(plan_for(request, at, min(size, 32 - at)), request) for at in range(0, 32, size)]
    positions = np.concatenate([part.positions for part in parts], axis=1)
    prompt = np.array([list(axis) for axis in request.mrope_positions])
    np.testing.assert_array_equal(positions[:, :30], prompt)
    np.testing.assert_array_equal(positions[:, 30:], [[30 - 11, 31 - 11]] * 3)
    tokens = np.concatenate([part.token_ids for part in parts])
    assert tokens.tolist() == request.token_ids.tolist()
    assert parts[-1].context_lens.tolist() == [32]
    assert parts[-1].sampling.output_index.tolist() == [2]


@pytest.mark.lesson("L17")
@pytest.mark.parametrize("size", [1, 3, 7, 30])
def test_prefix_encode_embeds_exactly_the_overlap(size: int) -> None:
    request, _ = make_request()
    owner = np.full(30, -1)
    for at in range(0, 30, size):
        batch = build(plan_for(request, at, min(size, 30 - at)), request)
        for part in batch.embeddings:
            unit = next(unit for unit in request.units if unit.key == part.key)
            for i in range(part.num_tokens):
                assert unit.offset + part.start + i == at + part.dest + i
                assert owner[at + part.dest + i] == -1
                owner[at + part.dest + i] = request.units.index(unit)
    expected = [-1] * 4 + [0] * 6 + [-1] * 4 + [1] * 4 + [2] * 4 + [3] * 2 + [-1] * 6
    assert owner.tolist() == expected


def test_units_are_dealt_out_by_patches() -> None:
    request, pixels = make_request()
    encode = tuple(EncodePlan(unit, "a") for unit in request.units)
    batch = build(plan_for(request, 0, 30, encode=encode), request, pixels, 2)
    load = [0, 0]
    for task, unit in zip(batch.encode, request.units, strict=True):
        assert task.key == unit.key
        load[task.rank] += unit.num_patches
    assert load == [32, 32]  # 24 + 8 against 16 + 16


def test_units_that_come_as_embeddings_are_no_work() -> None:
    request, units = make_request()
    image, *video = (unit.key for unit in request.units)
    embeds = np.ones((6, 8), np.float32)
    units[image] = UnitContent(image[0], (1, 4, 6), None, embeds)
    encode = tuple(EncodePlan(unit, "a") for unit in request.units)
    batch = build(plan_for(request, 0, 30, encode=encode), request, units, 2)
    first, *others = batch.encode
    assert first.pixels is None and first.embeds is embeds
    assert [task.key for task in others] == video
    assert [task.rank for task in others] == [0, 1, 0]  # the image's 24 patches weigh nothing
    as_pixels = build(plan_for(request, 0, 30, encode=encode), request, make_request()[1], 2)
    assert work_of(as_pixels) - work_of(batch) == 24


def test_seen_tokens_travel_for_a_penalty_alone() -> None:
    plain, _ = make_request()
    penal, _ = make_request(dataclasses.replace(GREEDY, repetition_penalty=1.5))
    for request, seen in ((plain, []), (penal, [*range(100, 129), -1])):
        batch = build(plan_for(request, 0, 30), request)
        assert batch.sampling.seen_token_ids[0].tolist() == seen


def test_copies_of_blocks_are_two_rows() -> None:
    request, _ = make_request()
    plan = plan_for(request, 20, 5, copies=((3, 7), (3, 8), (1, 9)))
    batch = build(plan, request)
    assert batch.copies.tolist() == [[3, 3, 1], [7, 8, 9]]
    assert build(plan_for(request, 20, 5), request).copies.shape == (2, 0)
