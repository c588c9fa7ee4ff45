"""Sample the next token of all rows at once, in float32.

The order is that of vLLM and transformers: repetition penalty, frequency and presence penalty,
logit edits, masks, temperature, top-k, top-p, min-p. The last three are thresholds on the logit, so
that ties are treated equally and the order of a sort does not matter.

Sampling is Gumbel-max over the kept tokens: the token with the largest logit + g, where g is Gumbel
noise from hashing (seed, output index, token id) with SplitMix64. It depends on nothing else, such
as the batch, the chunking or the device that computed the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InputError, RequestError
from .batch import Int32, LogitEdits, SamplingBatch, TokenMasks

GREEDY_BELOW = 1e-5  # lower temperatures are greedy: division would overflow
NOT_FINITE = RequestError("INTERNAL", "the model's logits for the next token are not finite")
NO_TOKEN = "bad_words exclude every token that the grammar allows"
NONE_LEFT = InputError("structured", NO_TOKEN).reason
FORBIDDEN = -3  # sampled by a row whose mask leaves no token

# Added to the logits of a mask byte's eight tokens; 20 times faster than masked_fill.
OF_BYTE = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, 0.0, -np.inf).astype(np.float32)

UInt64 = npt.NDArray[np.uint64]
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


class SeenTokens:
    """Token history of requests with penalties, one row per slot.

    Holds flags of prompt and output tokens and, once a request needs them, counts of output tokens.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._flags = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def flags(
        self, slots: Int32, fill: Sequence[Int32], last_token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Update slots, and return their flags, bool [p, vocab_size].

        Args:
            slots: [p].
            fill: [p] arrays; a non-empty one replaces the slot's content, without its last token.
            last_token_ids: int64 [p], added to the slots.
        """
        flags = self._flags = _grown(self._flags, slots)
        for slot, token_ids in zip(slots.tolist(), fill, strict=True):
            if token_ids.size:
                flags[slot] = False
                flags[slot, _known(token_ids[:-1], flags)] = True
        indices = torch.from_numpy(slots.astype(np.int64)).to(flags.device)
        flags[indices, last_token_ids] = True
        return flags[indices]

    def counts(
        self,
        slots: Int32,
        fill: Sequence[Int32],
        last_token_ids: torch.Tensor,
        output_index: Int32,
    ) -> torch.Tensor:
        """Update slots, and return the counts of their output tokens, int32 [p, vocab_size].

        output_index: [p] number of output tokens so far. Other arguments are those of `flags`.
        """
        counts = self._counts = _grown(self._counts, slots)
        vocab = counts.shape[1]
        for slot, token_ids, index in zip(slots.tolist(), fill, output_index.tolist(), strict=True):
            if token_ids.size:
                output = _known(token_ids[len(token_ids) - index : -1], counts)
                counts[slot] = torch.bincount(output, minlength=vocab).to(counts)
        indices = torch.from_numpy(slots.astype(np.int64)).to(counts.device)
        counts[indices, last_token_ids] += torch.from_numpy(output_index > 0).to(counts)
        return counts[indices]


def _grown(rows: torch.Tensor, slots: Int32) -> torch.Tensor:
    """Return `rows`, extended to contain all of `slots`."""
    missing = int(slots.max()) + 1 - len(rows)
    if missing <= 0:
        return rows
    more = max(missing, len(rows))  # double the size, for amortized copies
    return torch.cat([rows, rows.new_zeros(more, rows.shape[1])])


def _known(token_ids: Int32, rows: torch.Tensor) -> torch.Tensor:
    """Return the token ids below the width of `rows` (the vocabulary size), int64."""
    known = token_ids[(token_ids >= 0) & (token_ids < rows.shape[1])].astype(np.int64)
    return torch.from_numpy(known).to(rows.device)


@dataclass(frozen=True)
class Sampler:
    """Sampler that never chooses `banned_token_ids`; keeps penalty state in `seen`."""

    banned_token_ids: tuple[int, ...]
    seen: SeenTokens

    def sample(
        self, logits: torch.Tensor, batch: SamplingBatch, last_token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return sampled token ids, int64 [s].

        A row is -1 if its logits are not finite, and FORBIDDEN if its mask leaves no token.

        Args:
            logits: [s, vocab_size].
            batch: Sampling parameters of the s rows.
            last_token_ids: int64 [s], the input token of each row.
        """
        scores = logits.to(torch.float32, copy=True)
        bad = ~torch.isfinite(scores.sum(dim=-1))  # the sum is not finite if any logit is not
        self._penalize(scores, batch, last_token_ids)
        if batch.edits is not None:
            _edit(scores, batch.edits, last_token_ids)
        scores[:, list(self.banned_token_ids)] = -torch.inf
        if batch.masks is not None:
            _mask(scores, batch.masks)
        chosen = scores.argmax(dim=-1)
        if batch.masks is not None:
            left = scores.gather(1, chosen[:, None]).squeeze(1) > -torch.inf
        sampled = np.flatnonzero(batch.temperature >= GREEDY_BELOW)
        if sampled.size:
            rows = torch.from_numpy(sampled).to(scores.device)
            finite = scores[rows].masked_fill_(bad[rows, None], 0)
            chosen[rows] = _sample_rows(finite, sampled, batch)
        if batch.masks is not None:
            indices = torch.from_numpy(batch.masks.places.astype(np.int64)).to(scores.device)
            chosen[indices] = chosen[indices].masked_fill(~left[indices], FORBIDDEN)
        return chosen.masked_fill_(bad, -1)

    def _penalize(
        self, scores: torch.Tensor, batch: SamplingBatch, last_token_ids: torch.Tensor
    ) -> None:
        """Apply the repetition penalty, then presence and frequency penalties, in place.

        The repetition penalty divides positive logits of seen tokens and multiplies negative ones.
        """
        penalized = np.flatnonzero(batch.slots >= 0)
        if not penalized.size:
            return
        rows = torch.from_numpy(penalized).to(scores.device)
        tokens = (
            batch.slots[penalized],
            [batch.seen_token_ids[row] for row in penalized],
            last_token_ids[rows],
        )
        old = scores[rows]
        seen = self.seen.flags(*tokens)
        penalty = torch.from_numpy(batch.repetition_penalty[penalized]).to(old)[:, None]
        new = torch.where(seen, torch.where(old > 0, old / penalty, old * penalty), old)
        presence, frequency = batch.presence_penalty, batch.frequency_penalty
        if presence is not None and frequency is not None:
            counts = self.seen.counts(*tokens, batch.output_index[penalized])
            new -= torch.from_numpy(frequency[penalized]).to(old)[:, None] * counts
            new -= torch.from_numpy(presence[penalized]).to(old)[:, None] * (counts > 0)
        scores[rows] = new


def _edit(scores: torch.Tensor, edits: LogitEdits, last_token_ids: torch.Tensor) -> None:
    """Add biases in place, where a row's last token matches the edit's condition."""
    indices, after, token_ids = (
        torch.from_numpy(each.astype(np.int64)).to(scores.device)
        for each in (edits.places, edits.after, edits.token_ids)
    )
    holds = (after < 0) | (last_token_ids[indices] == after)
    bias = torch.from_numpy(edits.bias.copy()).to(scores).masked_fill_(~holds, 0)
    scores.index_put_((indices, token_ids), bias, accumulate=True)


def _mask(scores: torch.Tensor, masks: TokenMasks) -> None:
    """Set tokens that a row's mask forbids to -inf in place.

    On a CPU it works row by row, which stays in the cache.
    """
    device, vocab_size = scores.device, scores.shape[1]
    packed_rows = np.ascontiguousarray(masks.allowed).view(np.uint8)
    if device.type == "cpu":
        for index, packed_row in zip(masks.places.tolist(), packed_rows, strict=True):
            added = np.take(OF_BYTE, packed_row, axis=0).reshape(-1)[:vocab_size]
            scores[index].add_(torch.from_numpy(added))
        return
    indices = torch.from_numpy(masks.places.astype(np.int64)).to(device)
    packed = torch.from_numpy(packed_rows.copy()).to(device)
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
    allowed = (packed[:, :, None] & bits).bool().flatten(1)[:, :vocab_size]
    scores[indices] = scores[indices].masked_fill_(~allowed, -torch.inf)


def _sample_rows(
    scores: torch.Tensor, rows: npt.NDArray[np.intp], batch: SamplingBatch
) -> torch.Tensor:
    """Sample a token for each of the batch's `rows`, whose penalized logits are `scores`."""
    device = scores.device
    scores = scores / torch.from_numpy(batch.temperature[rows]).to(device)[:, None]
    top_k, top_p, min_p = batch.top_k[rows], batch.top_p[rows], batch.min_p[rows]
    scores = filter_scores(scores, top_k, top_p, min_p)
    kept = max(1, int((scores > -torch.inf).sum(dim=-1).max()))  # 0 if all tokens are forbidden
    if kept * 4 < scores.shape[1]:  # hashing a subset is cheaper
        scores, ids = scores.topk(kept, dim=-1)
    else:
        ids = torch.arange(scores.shape[1], device=device).expand_as(scores)
    keys = torch.from_numpy(row_keys(batch.seed[rows], batch.output_index[rows]).view(np.int64))
    best = (scores.double() + gumbel(keys.to(device), ids)).argmax(dim=-1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


def filter_scores(
    scores: torch.Tensor,
    top_k: npt.NDArray[np.int32],
    top_p: npt.NDArray[np.float32],
    min_p: npt.NDArray[np.float32],
) -> torch.Tensor:
    """Return `scores` [m, vocab_size] with -inf for tokens that the filters exclude.

    top_k, top_p, min_p: [m]; 0, 1 and 0 disable them. The most likely token is always kept.
    """
    vocab = scores.shape[1]
    counts = np.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
    top = scores.max(dim=-1, keepdim=True).values
    with np.errstate(divide="ignore"):
        least = np.log(min_p)  # -inf if disabled
    floor = top + torch.from_numpy(least).to(top)[:, None]
    if (counts < vocab).any() or (top_p < 1).any():
        needed = int(counts[(counts < vocab) | (top_p < 1)].max())
        floor = torch.maximum(floor, _rank_floor(scores, top, counts, top_p, needed))
    return scores.masked_fill(scores < floor, -torch.inf)


def _rank_floor(
    scores: torch.Tensor,
    top: torch.Tensor,
    counts: npt.NDArray[np.integer],
    top_p: npt.NDArray[np.float32],
    needed: int,
) -> torch.Tensor:
    """Return the smallest logit [m, 1] that top-k and top-p keep; sorts `needed` logits."""
    device = scores.device
    ranked = scores.topk(needed, dim=-1).values  # descending
    count = torch.from_numpy(counts.astype(np.int64)).to(device)[:, None]
    kth = ranked.gather(1, count.clamp(max=needed) - 1)
    kth = kth.masked_fill(count == scores.shape[1], -torch.inf)
    weights = torch.where(scores >= kth, (scores - top).double().exp(), 0.0)
    share = (ranked - top).double().exp() / weights.sum(dim=-1, keepdim=True)
    before = share.cumsum(dim=-1) - share  # probability of all more likely tokens
    limit = torch.from_numpy(top_p.astype(np.float64)).to(device)[:, None]
    inside = ((before < limit) & (ranked >= kth)).sum(dim=-1, keepdim=True).clamp(min=1)
    nucleus = ranked.gather(1, inside - 1).masked_fill(limit >= 1, -torch.inf)
    return torch.maximum(kth, nucleus)


def row_keys(seeds: UInt64, output_index: npt.NDArray[np.int32]) -> UInt64:
    """Return a 64-bit key for each (seed, output index), both [m]."""
    index = output_index.astype(np.uint64) + np.uint64(1)
    return _mix(_mix(seeds.astype(np.uint64)) ^ (index * np.uint64(GOLDEN)))


def _mix(x: UInt64) -> UInt64:
    """Apply SplitMix64's finalizer (Steele, Lea, Flood 2014), on the host."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return Gumbel noise, float64 [m, k], for keys int64 [m] and token ids int64 [m, k].

    The hash is element `token_id` of the key's SplitMix64 stream. Its upper 52 bits are a uniform u
    in (0, 1), and the noise is -log(-log u).
    """
    x = keys[:, None] + (token_ids + 1) * _signed(GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    x = x ^ _shift(x, 31)
    uniform = (_shift(x, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()


def _signed(constant: int) -> int:
    """Return the int64 with the bits of a 64-bit constant; torch's products wrap around."""
    return constant - (1 << 64) if constant >> 63 else constant


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 right logically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
