"""One step's input as a rank gets it: flat numpy arrays, rows parallel, nothing of torch.

`n` is the number of tokens of the step, `r` the number of rows (requests), `s` the number of rows
that sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...scheduler.request import UnitKey

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodeTask:
    """A unit to encode: uint8 RGB frames [t, height, width, 3], already resized.

    An image has t = 1 and is seen twice by its temporal patch; a video unit has
    t = temporal_patch_size × temporal patches. Or a unit whose embedding a caller brought, which is
    kept as it is.
    """

    key: UnitKey
    grid_thw: tuple[int, int, int]  # of the unit, in patches
    rank: int  # who encodes it, or has its embedding
    pixels: UInt8 | None  # None on the other ranks
    embeds: Float32 | None = None  # [num_tokens, hidden_size] in place of pixels


@dataclass(frozen=True)
class EmbeddingSlice:
    """A unit's embedding rows [start, start + num_tokens) go to the step's tokens [dest, ...)."""

    key: UnitKey
    start: int
    num_tokens: int
    dest: int
    row: int  # the request's row, for blame when the embedding is missing


@dataclass(frozen=True)
class LogitEdits:
    """What is added to single tokens' logits, parallel arrays; -inf: never drawn."""

    places: Int32  # [e] among the s rows that sample
    after: Int32  # [e] only where the row's last token is this; -1: whatever it is
    token_ids: Int32  # [e]
    bias: Float32  # [e]


@dataclass(frozen=True)
class TokenMasks:
    """What may be drawn in rows whose answer has a form."""

    places: Int32  # [g] among the s rows that sample
    allowed: Int32  # [g, vocab_size / 32, rounded up]: a bit a token id, the lowest first


@dataclass(frozen=True)
class PromptTargets:
    """Tokens of prompts whose log probability is asked for, parallel arrays."""

    at: Int32  # [q] the step's token that is before it
    token_ids: Int32  # [q]


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling settings of the s rows that sample, parallel arrays."""

    rows: Int32  # [s] row of the step
    temperature: Float32  # [s]; 0 is greedy
    top_k: Int32  # [s]; 0 is off
    top_p: Float32  # [s]; 1 is off
    min_p: Float32  # [s]; 0 is off
    repetition_penalty: Float32  # [s]; 1 is off
    seed: npt.NDArray[np.uint64]  # [s]
    output_index: Int32  # [s] index of the token to draw among the request's output
    slots: (
        Int32  # [s] where this rank keeps the tokens that the penalty looks at; -1 where it is off
    )
    # [s] of [k]: the row's tokens up to its last, which the slot is to hold from now on; empty: it
    # holds all but the last. The last comes from the step's tokens, whatever is here in its place.
    seen_token_ids: tuple[Int32, ...]
    # From here on None where no row needs it.
    presence_penalty: Float32 | None = None  # [s]; 0 is off
    frequency_penalty: Float32 | None = None  # [s]; 0 is off
    edits: LogitEdits | None = None
    masks: TokenMasks | None = None
    logprob_places: Int32 | None = None  # [l] the rows, among the s, whose log probability is told
    prompt_targets: PromptTargets | None = None


@dataclass(frozen=True)
class InputBatch:
    """A step of one rank."""

    token_ids: Int32  # [n]; placeholders keep their token id
    positions: Int32  # [3, n] M-RoPE: temporal, height, width
    num_scheduled_tokens: Int32  # [r]
    context_lens: Int32  # [r] tokens in the cache once this step is computed
    block_tables: Int32  # [r, most blocks of a row], padded with 0
    sampling: SamplingBatch
    # [r] the row's one token is that which the step before drew at this place; -1: it is known
    awaits: Int32
    # [2, c] blocks to copy, from and to: all are read before any is written
    copies: Int32 = field(default_factory=lambda: np.empty((2, 0), np.int32))
    encode: tuple[EncodeTask, ...] = ()
    embeddings: tuple[EmbeddingSlice, ...] = ()
    drop: tuple[UnitKey, ...] = ()


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities at l places; of the k likeliest tokens each, in no order."""

    at: Int32  # [l] as in what asked: `logprob_places` or `PromptTargets.at`
    chosen: Float32  # [l] of the token that was drawn, or is in the prompt
    top_token_ids: Int32  # [l, k]
    top: Float32  # [l, k]


@dataclass(frozen=True)
class BatchResult:
    """What a rank's step made. Rank 0's counts; the others return the same ids."""

    sampled: Int32  # [s]; -1 where the row was not computed
    missing: tuple[UnitKey, ...] = ()  # embeddings that were not there; their rows were skipped
    errors: tuple[tuple[int, str], ...] = ()  # (row, what went wrong)
    logprobs: Logprobs | None = None  # of rank 0, where asked for
    prompt_logprobs: Logprobs | None = None  # likewise
    encode_seconds: float = 0.0  # of the encode stage alone, where there was one
