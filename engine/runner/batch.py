"""Input and output of a step on a rank: flat numpy arrays, parallel per row, without torch.

`n` is the number of tokens of the step, `r` the number of rows (requests), `s` the number of rows
that sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...scheduler.errors import RequestError
from ...scheduler.request import UnitKey

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodeTask:
    """A unit to encode: uint8 RGB frames [t, height, width, 3], already resized.

    An image has t = 1; its temporal patch repeats the frame. A video unit has
    t = temporal_patch_size × temporal patches. Alternatively, `embeds` is a caller-supplied
    embedding, which is used unchanged.
    """

    key: UnitKey
    grid_thw: tuple[int, int, int]  # of the unit, in patches
    rank: int  # the rank that encodes it, or has its embedding
    pixels: UInt8 | None  # None on the other ranks
    embeds: Float32 | None = None  # [num_tokens, hidden_size], instead of pixels


@dataclass(frozen=True)
class EmbeddingSlice:
    """Rows [start, start + num_tokens) of a unit's embedding, for tokens [dest, ...)."""

    key: UnitKey
    start: int
    num_tokens: int
    dest: int
    row: int  # the request's row, to report a missing embedding


@dataclass(frozen=True)
class LogitEdits:
    """Values added to the logits of single tokens, in parallel arrays; -inf bans a token."""

    places: Int32  # [e] index among the s rows that sample
    after: Int32  # [e] applies only if the row's last token is this; -1: always
    token_ids: Int32  # [e]
    bias: Float32  # [e]


@dataclass(frozen=True)
class TokenMasks:
    """Tokens allowed in rows with structured output."""

    places: Int32  # [g] index among the s rows that sample
    allowed: Int32  # [g, ceil(vocab_size / 32)]: one bit per token id, lowest first


@dataclass(frozen=True)
class PromptTargets:
    """Prompt tokens whose log probabilities are requested, in parallel arrays."""

    at: Int32  # [q] index of the preceding token in the step
    token_ids: Int32  # [q]


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of the s rows that sample, in parallel arrays."""

    rows: Int32  # [s] row of the step
    temperature: Float32  # [s]; 0 is greedy
    top_k: Int32  # [s]; 0 is off
    top_p: Float32  # [s]; 1 is off
    min_p: Float32  # [s]; 0 is off
    repetition_penalty: Float32  # [s]; 1 is off
    seed: npt.NDArray[np.uint64]  # [s]
    output_index: Int32  # [s] output index of the token to sample
    slots: Int32  # [s] slot of the row's token history for penalties; -1: no penalty
    # [s] arrays of [k]: the row's tokens, to refill the slot with; empty: the slot has all but the
    # last. The last token always comes from the step's input; its value here is ignored.
    seen_token_ids: tuple[Int32, ...]
    # The remaining fields are None if no row needs them.
    presence_penalty: Float32 | None = None  # [s]; 0 is off
    frequency_penalty: Float32 | None = None  # [s]; 0 is off
    edits: LogitEdits | None = None
    masks: TokenMasks | None = None
    logprob_places: Int32 | None = None  # [l] index among the s rows: logprobs are requested
    prompt_targets: PromptTargets | None = None


@dataclass(frozen=True)
class InputBatch:
    """Input of a step on one rank."""

    token_ids: Int32  # [n]; placeholders keep their token id
    positions: Int32  # [3, n] M-RoPE: temporal, height, width
    num_scheduled_tokens: Int32  # [r]
    context_lens: Int32  # [r] tokens in the cache after this step
    block_tables: Int32  # [r, blocks of the longest row], padded with 0
    sampling: SamplingBatch
    # [r] index of the row's input token among the tokens sampled by the previous step; -1: known
    awaits: Int32
    # [2, c] source and target blocks of copies; all sources are read before any write
    copies: Int32 = field(default_factory=lambda: np.empty((2, 0), np.int32))
    encode: tuple[EncodeTask, ...] = ()
    embeddings: tuple[EmbeddingSlice, ...] = ()
    drop: tuple[UnitKey, ...] = ()


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities at l positions, each with the top k tokens in no particular order."""

    at: Int32  # [l] from `logprob_places` or `PromptTargets.at`
    chosen: Float32  # [l] of the sampled token, or of the prompt's
    top_token_ids: Int32  # [l, k]
    top: Float32  # [l, k]


@dataclass(frozen=True)
class BatchResult:
    """Result of a step on a rank. Rank 0's is authoritative; all have the same token ids."""

    sampled: Int32  # [s]; -1 if the row was skipped
    missing: tuple[UnitKey, ...] = ()  # missing embeddings; their rows were skipped
    errors: tuple[tuple[int, RequestError], ...] = ()  # (row, its error)
    logprobs: Logprobs | None = None  # on rank 0, if requested
    prompt_logprobs: Logprobs | None = None  # on rank 0, if requested
    encode_seconds: float = 0.0  # duration of the encode stage; 0 without one
