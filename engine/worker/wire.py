"""Convert `InputBatch` and `BatchResult` to and from protobuf messages.

Arrays are sent as little-endian bytes. The engine and its workers trust each other, but all lengths
are checked, so that mismatched versions fail with an error instead of wrong results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...proto import worker_pb2 as pb
from ...scheduler.errors import RequestError
from ...scheduler.request import UnitKey
from ..runner.batch import (
    BatchResult,
    EmbeddingSlice,
    EncodeTask,
    Float32,
    InputBatch,
    Int32,
    LogitEdits,
    Logprobs,
    PromptTargets,
    SamplingBatch,
    TokenMasks,
    UInt8,
)

# Optional fields of `SamplingBatch`: None if no row needs them.
MAYBE_ARRAYS = ("presence_penalty", "frequency_penalty", "logprob_places")
MAYBE_TABLES = ("edits", "prompt_targets", "masks")

INT32, FLOAT32, UINT64 = np.dtype("<i4"), np.dtype("<f4"), np.dtype("<u8")


class WireError(ValueError):
    """A message contains arrays of inconsistent lengths."""


def pack_steps(
    batch: InputBatch, epoch: int, step_id: int, previous_step_id: int, num_ranks: int
) -> tuple[pb.StepRequest, ...]:
    """Return one request per rank; only the rank that encodes a unit gets its pixels."""
    common = _pack_common(batch)
    common.epoch, common.step_id, common.previous_step_id = epoch, step_id, previous_step_id
    if not batch.encode:
        return (common,) * num_ranks
    requests = []
    for rank in range(num_ranks):
        request = pb.StepRequest()
        request.CopyFrom(common)
        request.encode.extend(_pack_encode(task, rank) for task in batch.encode)
        requests.append(request)
    return tuple(requests)


def _pack_common(batch: InputBatch) -> pb.StepRequest:
    return pb.StepRequest(
        token_ids=batch.token_ids.tobytes(),
        positions=batch.positions.tobytes(),
        num_scheduled_tokens=batch.num_scheduled_tokens.tobytes(),
        context_lens=batch.context_lens.tobytes(),
        block_tables=batch.block_tables.tobytes(),
        sampling=_pack_sampling(batch.sampling),
        awaits=batch.awaits.tobytes(),
        copies=batch.copies.tobytes(),
        embeddings=[
            pb.Embedding(
                unit=_pack_key(part.key),
                start=part.start,
                num_tokens=part.num_tokens,
                dest=part.dest,
                row=part.row,
            )
            for part in batch.embeddings
        ],
        drop=[_pack_key(key) for key in batch.drop],
    )


def _pack_sampling(sampling: SamplingBatch) -> pb.Sampling:
    packed = pb.Sampling(
        rows=sampling.rows.tobytes(),
        temperature=sampling.temperature.tobytes(),
        top_k=sampling.top_k.tobytes(),
        top_p=sampling.top_p.tobytes(),
        min_p=sampling.min_p.tobytes(),
        repetition_penalty=sampling.repetition_penalty.tobytes(),
        seed=sampling.seed.tobytes(),
        output_index=sampling.output_index.tobytes(),
        slots=sampling.slots.tobytes(),
        seen_token_ids=[seen.tobytes() for seen in sampling.seen_token_ids],
    )
    for name in MAYBE_ARRAYS:
        if (array := getattr(sampling, name)) is not None:
            setattr(packed, name, array.tobytes())
    for name in MAYBE_TABLES:
        if (table := getattr(sampling, name)) is not None:
            for column, array in vars(table).items():
                setattr(getattr(packed, name), column, array.tobytes())
    return packed


def _pack_encode(task: EncodeTask, rank: int) -> pb.Encode:
    packed = pb.Encode(unit=_pack_key(task.key), grid_thw=task.grid_thw, rank=task.rank)
    if task.rank != rank:
        return packed
    if task.pixels is not None:
        packed.shape.extend(task.pixels.shape[:3])
        packed.pixels = task.pixels.tobytes()
    if task.embeds is not None:
        packed.shape.extend(task.embeds.shape)
        packed.embeds = task.embeds.tobytes()
    return packed


def _pack_key(key: UnitKey) -> pb.Unit:
    return pb.Unit(media_hash=key[0], index=key[1])


def unpack_step(request: pb.StepRequest) -> InputBatch:
    """Return the batch of a request. Raises `WireError` if lengths are inconsistent."""
    token_ids = _array(request.token_ids, INT32)
    num_tokens = len(token_ids)
    scheduled = _array(request.num_scheduled_tokens, INT32)
    num_rows = len(scheduled)
    if int(scheduled.sum()) != num_tokens:
        raise WireError(
            f"num_scheduled_tokens: the sum is {scheduled.sum()}, but there are {num_tokens} tokens"
        )
    return InputBatch(
        token_ids=token_ids,
        positions=_array(request.positions, INT32, 3, num_tokens),
        num_scheduled_tokens=scheduled,
        context_lens=_array(request.context_lens, INT32, num_rows),
        block_tables=_array(request.block_tables, INT32, num_rows, -1),
        sampling=_unpack_sampling(request.sampling),
        awaits=_array(request.awaits, INT32, num_rows),
        copies=_array(request.copies, INT32, 2, -1),
        encode=tuple(_unpack_encode(task) for task in request.encode),
        embeddings=tuple(
            EmbeddingSlice(_unpack_key(p.unit), p.start, p.num_tokens, p.dest, p.row)
            for p in request.embeddings
        ),
        drop=_unpack_keys(request.drop),
    )


def _unpack_sampling(sampling: pb.Sampling) -> SamplingBatch:
    rows = _array(sampling.rows, INT32)
    if len(sampling.seen_token_ids) != len(rows):
        raise WireError(
            f"seen_token_ids: {len(sampling.seen_token_ids)} entries for {len(rows)} rows"
        )
    return SamplingBatch(
        rows=rows,
        temperature=_array(sampling.temperature, FLOAT32, len(rows)),
        top_k=_array(sampling.top_k, INT32, len(rows)),
        top_p=_array(sampling.top_p, FLOAT32, len(rows)),
        min_p=_array(sampling.min_p, FLOAT32, len(rows)),
        repetition_penalty=_array(sampling.repetition_penalty, FLOAT32, len(rows)),
        seed=_array(sampling.seed, UINT64, len(rows)),
        output_index=_array(sampling.output_index, INT32, len(rows)),
        slots=_array(sampling.slots, INT32, len(rows)),
        seen_token_ids=tuple(_array(seen, INT32) for seen in sampling.seen_token_ids),
        **_unpack_optional(sampling, len(rows)),
    )


def _unpack_optional(sampling: pb.Sampling, num_rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            found[name] = _array(getattr(sampling, name), FLOAT32, num_rows)
    if sampling.HasField("edits"):
        edits = sampling.edits
        places = _array(edits.places, INT32)
        size = len(places)
        after, token_ids = _array(edits.after, INT32, size), _array(edits.token_ids, INT32, size)
        found["edits"] = LogitEdits(places, after, token_ids, _array(edits.bias, FLOAT32, size))
    if sampling.HasField("masks"):
        places = _array(sampling.masks.places, INT32)
        allowed = _array(sampling.masks.allowed, INT32, len(places), -1)
        found["masks"] = TokenMasks(places, allowed)
    if sampling.logprob_places:
        found["logprob_places"] = _array(sampling.logprob_places, INT32)
    if sampling.HasField("prompt_targets"):
        at = _array(sampling.prompt_targets.at, INT32)
        targets = _array(sampling.prompt_targets.token_ids, INT32, len(at))
        found["prompt_targets"] = PromptTargets(at, targets)
    return found


def _unpack_encode(task: pb.Encode) -> EncodeTask:
    pixels: UInt8 | None = None
    embeds: Float32 | None = None
    if task.pixels:
        pixels = _array(task.pixels, np.dtype("u1"), *task.shape, 3)
    if task.embeds:
        embeds = _array(task.embeds, FLOAT32, *task.shape)
    frames, height, width = task.grid_thw
    return EncodeTask(_unpack_key(task.unit), (frames, height, width), task.rank, pixels, embeds)


def _unpack_key(unit: pb.Unit) -> UnitKey:
    return (unit.media_hash, unit.index)


def _unpack_keys(units: Iterable[pb.Unit]) -> tuple[UnitKey, ...]:
    return tuple(_unpack_key(unit) for unit in units)


def pack_result(
    result: BatchResult, epoch: int, step_id: int, seconds: float = 0.0
) -> pb.StepReply:
    """Return the reply to a step; `seconds` is the step's time on this rank."""
    reply = pb.StepReply(
        epoch=epoch,
        step_id=step_id,
        sampled=result.sampled.astype(INT32, copy=False).tobytes(),
        missing=[_pack_key(key) for key in result.missing],
        errors=[_pack_error(row, error) for row, error in result.errors],
        seconds=seconds,
        encode_seconds=result.encode_seconds,
    )
    for name in ("logprobs", "prompt_logprobs"):
        if (found := getattr(result, name)) is not None:
            for column, array in vars(found).items():
                setattr(getattr(reply, name), column, array.tobytes())
    return reply


def _pack_error(row: int, error: RequestError) -> pb.RowError:
    return pb.RowError(row=row, text=error.message, code=error.code, field=error.field)


def unpack_results(replies: Sequence[pb.StepReply]) -> BatchResult:
    """Combine the replies of all ranks, in rank order.

    Rank 0 samples; an embedding that one rank lacks counts as missing on all.
    """
    first = replies[0]
    missing = [key for reply in replies for key in _unpack_keys(reply.missing)]
    return BatchResult(
        sampled=_array(first.sampled, INT32),
        missing=tuple(dict.fromkeys(missing)),
        errors=tuple(
            (each.row, RequestError(each.code, each.text, each.field)) for each in first.errors
        ),
        logprobs=_unpack_logprobs(first, "logprobs"),
        prompt_logprobs=_unpack_logprobs(first, "prompt_logprobs"),
        encode_seconds=max(reply.encode_seconds for reply in replies),
    )


def _unpack_logprobs(reply: pb.StepReply, name: str) -> Logprobs | None:
    if not reply.HasField(name):
        return None
    packed: pb.Logprobs = getattr(reply, name)
    at = _array(packed.at, INT32)
    return Logprobs(
        at=at,
        chosen=_array(packed.chosen, FLOAT32, len(at)),
        top_token_ids=_array(packed.top_token_ids, INT32, len(at), -1),
        top=_array(packed.top, FLOAT32, len(at), -1),
    )


def _array(data: bytes, dtype: np.dtype, *shape: int) -> npt.NDArray:
    """Return a read-only view of `data`; one dimension may be -1 (0 if there are no rows)."""
    flat = np.frombuffer(data, dtype)
    if not shape:
        return flat
    if -1 in shape and 0 in shape:
        shape = tuple(0 if size == -1 else size for size in shape)
    try:
        return flat.reshape(shape)
    except ValueError:
        raise WireError(f"array of {flat.size} {dtype} does not have shape {shape}") from None


def empty_sampling() -> SamplingBatch:
    """Return the `SamplingBatch` of a step without sampling rows."""
    none_i, none_f = np.empty(0, INT32), np.empty(0, FLOAT32)
    return SamplingBatch(
        none_i, none_f, none_i, none_f, none_f, none_f, np.empty(0, UINT64), none_i, none_i, ()
    )


__all__ = [
    "Int32",
    "WireError",
    "empty_sampling",
    "pack_result",
    "pack_steps",
    "unpack_results",
    "unpack_step",
]
