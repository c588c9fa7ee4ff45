"""Convert a step plan to the workers' input arrays, and their output to a step result."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from ...scheduler.request import Request, UnitKey, overlapping
from ...scheduler.step import EncodePlan, StepPlan, StepResult
from ..media.item import UnitContent
from ..runner.batch import BatchResult, EmbeddingSlice, EncodeTask, InputBatch, Int32, SamplingBatch
from ..structured_output.matchers import Matchers
from .logit_edits import logit_edits
from .logprobs import logprob_places, logprobs_of_drawn, logprobs_of_prompts, prompt_targets
from .penalty_slots import SamplingSlots

INT32 = np.dtype("<i4")
NONE = np.empty(0, INT32)

Bounds = tuple[Request, int, int]  # (request, first token, number of tokens) of a batch row


def build_batch(
    plan: StepPlan,
    requests: Mapping[str, Request],
    pixels: Mapping[str, Mapping[UnitKey, UnitContent]],
    slots: SamplingSlots,
    num_ranks: int,
    matchers: Matchers | None = None,
) -> InputBatch:
    """Build the input arrays of a step.

    `pixels`: decoded media units by request. `matchers`: state of structured output requests.
    """
    rows = [requests[request_id] for request_id in plan.request_ids]
    starts = np.asarray(plan.num_computed_tokens, INT32)
    counts = np.asarray(plan.num_scheduled_tokens, INT32)
    bounds = list(zip(rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True))
    awaits = np.array(plan.awaits or [-1] * len(rows), INT32)
    return InputBatch(
        token_ids=_token_ids(bounds, awaits),
        positions=_positions(bounds, counts),
        num_scheduled_tokens=counts,
        context_lens=starts + counts,
        block_tables=_block_tables(plan.block_tables),
        sampling=_sampling(plan, bounds, slots, matchers),
        awaits=awaits,
        copies=np.array(plan.copies, INT32).reshape(-1, 2).T,
        encode=_encode_tasks(plan.encode, pixels, num_ranks),
        embeddings=_embedding_slices(bounds),
        drop=plan.drop,
    )


def _token_ids(bounds: Sequence[Bounds], awaits: Int32) -> Int32:
    """Return the step's token ids; 0 for tokens that the step in flight will sample."""
    parts = [row.token_ids[start : start + count].tobytes() for row, start, count in bounds]
    for row in np.flatnonzero(awaits >= 0):
        parts[row] = bytes(INT32.itemsize)
    return np.frombuffer(b"".join(parts), INT32)


def _positions(bounds: Sequence[Bounds], counts: Int32) -> Int32:
    """Return M-RoPE positions [3, n] of the step's tokens; output tokens have equal axes."""
    shifts = np.array([start + row.mrope_position_delta for row, start, _ in bounds], INT32)
    firsts = np.cumsum(counts) - counts
    found = np.arange(counts.sum(), dtype=INT32) + np.repeat(shifts - firsts, counts)
    positions = np.tile(found.astype(INT32), (3, 1))
    for (row, start, count), first in zip(bounds, firsts, strict=True):
        in_prompt = min(count, row.num_prompt_tokens - start)
        if in_prompt > 0:
            axes = [axis[start : start + in_prompt] for axis in row.mrope_positions]
            positions[:, first : first + in_prompt] = axes
    return positions


def _block_tables(tables: Sequence[array[int]]) -> Int32:
    """Stack the block tables, padded with 0; the kernels never read past a row's length."""
    padded = np.zeros((len(tables), max((len(table) for table in tables), default=0)), INT32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = np.frombuffer(table, INT32) if table else 0
    return padded


def _sampling(
    plan: StepPlan, bounds: Sequence[Bounds], slots: SamplingSlots, matchers: Matchers | None
) -> SamplingBatch:
    sampled = [bound for bound, samples in zip(bounds, plan.samples, strict=True) if samples]
    penalized = [_slot(slots, *bound) for bound in sampled]
    params = [request.params for request, _, _ in sampled]

    def column(name: str, dtype: str) -> np.ndarray:
        return np.array(list(map(attrgetter(name), params)), dtype)

    return SamplingBatch(
        rows=np.flatnonzero(plan.samples).astype(INT32),
        temperature=column("temperature", "<f4"),
        top_k=column("top_k", "<i4"),
        top_p=column("top_p", "<f4"),
        min_p=column("min_p", "<f4"),
        repetition_penalty=column("repetition_penalty", "<f4"),
        seed=column("seed", "<u8"),
        output_index=np.array([start + n - r.num_prompt_tokens for r, start, n in sampled], INT32),
        slots=np.array([slot for slot, _ in penalized], INT32),
        seen_token_ids=tuple([seen for _, seen in penalized]),
        **_optional_fields(bounds, sampled, column, matchers),
    )


def _optional_fields(
    bounds: Sequence[Bounds],
    sampled: Sequence[Bounds],
    column: Callable[[str, str], np.ndarray],
    matchers: Matchers | None,
) -> dict[str, Any]:
    """Return optional sampling tensors, built only if some row needs them."""
    more: dict[str, Any] = {}
    if all(request.is_plain for request, _, _ in bounds):
        return more
    requests = [request for request, _, _ in sampled]
    if any(request.has_counts for request in requests):
        more["presence_penalty"] = column("presence_penalty", "<f4")
        more["frequency_penalty"] = column("frequency_penalty", "<f4")
    more["edits"] = logit_edits([(request, start + n) for request, start, n in sampled])
    if matchers is not None:
        more["masks"] = matchers.masks(requests)
    more["logprob_places"] = logprob_places(requests)
    more["prompt_targets"] = prompt_targets(bounds)
    return more


def _slot(slots: SamplingSlots, request: Request, start: int, count: int) -> tuple[int, Int32]:
    """Return a row's penalty slot (-1: none), and its token history if the slot needs a refill."""
    if not request.has_penalty:
        return -1, NONE
    slot, kept = slots.place(request, start, count)
    if kept:
        return slot, NONE
    seen = np.full(start + count, -1, INT32)  # The last token may still be in flight.
    seen[:-1] = request.token_ids[: start + count - 1]
    return slot, seen


def _encode_tasks(
    encode: Sequence[EncodePlan],
    pixels: Mapping[str, Mapping[UnitKey, UnitContent]],
    num_ranks: int,
) -> tuple[EncodeTask, ...]:
    """Distribute units over ranks by patch count, largest first, each to the least loaded rank.

    Units passed as embeddings count as no work.
    """
    sources = [pixels[plan.request_id][plan.unit.key] for plan in encode]
    patches = [
        plan.unit.num_patches if source.embeds is None else 0
        for plan, source in zip(encode, sources, strict=True)
    ]
    load = [0] * num_ranks
    ranks: dict[int, int] = {}
    for i in sorted(range(len(encode)), key=lambda i: -patches[i]):
        ranks[i] = load.index(min(load))
        load[ranks[i]] += patches[i]
    return tuple(
        EncodeTask(plan.unit.key, source.grid_thw, ranks[i], source.pixels, source.embeds)
        for i, (plan, source) in enumerate(zip(encode, sources, strict=True))
    )


def _embedding_slices(bounds: Sequence[Bounds]) -> tuple[EmbeddingSlice, ...]:
    """Map rows of media embeddings to the step's token positions they replace."""
    slices = []
    base = 0
    for row, (request, start, count) in enumerate(bounds):
        done = start >= request.media_end
        for unit in () if done else overlapping(request.units, start, start + count):
            low, high = max(unit.offset, start), min(unit.end, start + count)
            dest = base + low - start
            slices.append(EmbeddingSlice(unit.key, low - unit.offset, high - low, dest, row))
        base += count
    return tuple(slices)


def step_result(plan: StepPlan, result: BatchResult, requests: Mapping[str, Request]) -> StepResult:
    """Convert the workers' output to a step result. `requests`: active requests by id."""
    return StepResult(
        step_id=plan.step_id,
        sampled=tuple(result.sampled.tolist()),
        missing=result.missing,
        errors={plan.request_ids[row]: error for row, error in result.errors},
        logprobs=logprobs_of_drawn(plan, result, requests),
        prompt_logprobs=logprobs_of_prompts(plan, result, requests),
    )
