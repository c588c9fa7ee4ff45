"""Log probabilities: the rows to compute in a step, and the results by request."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from ...scheduler.logprobs import TokenLogprobs
from ...scheduler.request import Request, overlapping
from ...scheduler.step import StepPlan
from ..runner.batch import BatchResult, Int32, Logprobs, PromptTargets

Bounds = tuple[Request, int, int]  # (request, first token, number of tokens) of a batch row


def logprob_places(sampled: Sequence[Request]) -> Int32 | None:
    """Return the indices of sampling rows that request logprobs of their sampled token."""
    rows = [i for i, request in enumerate(sampled) if request.params.logprobs is not None]
    return np.array(rows, np.int32) if rows else None


def prompt_targets(bounds: Sequence[Bounds]) -> PromptTargets | None:
    """Return prompt positions whose logprobs were requested and not yet returned."""
    at: list[Int32] = []
    token_ids: list[Int32] = []
    first = 0
    for request, start, count in bounds:
        if request.awaits_prompt_logprobs:
            asked = _asked(request, start, start + count)
            at.append((asked - 1 - start + first).astype(np.int32))
            token_ids.append(np.frombuffer(request.prompt_token_ids, np.int32)[asked])
        first += count
    if not sum(map(len, at)):
        return None
    return PromptTargets(np.concatenate(at), np.concatenate(token_ids))


def _asked(request: Request, start: int, end: int) -> np.ndarray:
    """Return indices of prompt tokens that the logits of [start, end) predict.

    These are the tokens that follow, without media placeholders, which are never sampled.
    """
    low = max(start + 1, len(request.prompt_logprobs))
    high = min(end + 1, request.num_prompt_tokens)
    is_text = np.ones(max(0, high - low), bool)
    for unit in overlapping(request.units, low, high):
        is_text[max(0, unit.offset - low) : unit.end - low] = False
    return low + np.flatnonzero(is_text)


def logprobs_of_drawn(
    plan: StepPlan, result: BatchResult, requests: Mapping[str, Request]
) -> dict[str, TokenLogprobs]:
    """Return log probabilities of sampled tokens by request_id."""
    found = result.logprobs
    if found is None:
        return {}
    pairs = zip(plan.request_ids, plan.samples, strict=True)
    sampling = [name for name, samples in pairs if samples]
    names = [sampling[row] for row in found.at]
    counts = [_count(requests.get(name), "logprobs") for name in names]
    entries = _entries(found, result.sampled[found.at], counts)
    return dict(zip(names, entries, strict=True))


def logprobs_of_prompts(
    plan: StepPlan,
    result: BatchResult,
    requests: Mapping[str, Request],
) -> dict[str, dict[int, TokenLogprobs]]:
    """Return log probabilities of prompt tokens by request_id and index in the prompt."""
    found = result.prompt_logprobs
    if found is None:
        return {}
    ends = np.cumsum(plan.num_scheduled_tokens)
    row_of = np.searchsorted(ends, found.at, side="right")
    firsts = ends - plan.num_scheduled_tokens
    index = np.asarray(plan.num_computed_tokens)[row_of] + found.at - firsts[row_of] + 1
    names = [plan.request_ids[row] for row in row_of]
    asked = {name: requests.get(name) for name in set(names)}
    token_ids = [
        request.prompt_token_ids[at] if (request := asked[name]) else -1
        for name, at in zip(names, index.tolist(), strict=True)
    ]
    counts = [_count(asked[name], "prompt_logprobs") for name in names]
    by_name: dict[str, dict[int, TokenLogprobs]] = {name: {} for name in asked}
    entries = _entries(found, np.array(token_ids), counts)
    for name, at, entry in zip(names, index.tolist(), entries, strict=True):
        by_name[name][at] = entry
    return by_name


def _count(request: Request | None, name: str) -> int:
    """Return the number of top-k tokens requested; 0 if the request has finished."""
    return 0 if request is None else getattr(request.params, name) or 0


def _entries(found: Logprobs, token_ids: np.ndarray, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Return one entry per token, with `counts[i]` top-k tokens.

    Top-k tokens are sorted by descending probability, ties by ascending token id.
    """
    by_id = found.top_token_ids.argsort(axis=1)
    ids, top = (np.take_along_axis(each, by_id, 1) for each in (found.top_token_ids, found.top))
    order = (-top).argsort(axis=1, kind="stable")
    ids, top = (np.take_along_axis(each, order, 1) for each in (ids, top))
    return [
        TokenLogprobs(
            token_id,
            chosen,
            array("i", ids[row, :count].astype(np.int32).tobytes()),
            array("f", top[row, :count].astype(np.float32).tobytes()),
        )
        for row, (token_id, chosen, count) in enumerate(
            zip(token_ids.tolist(), found.chosen.tolist(), counts, strict=True)
        )
    ]
