"""Log probabilities from the model's raw logits, and top-k tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...scheduler.params import MAX_LOGPROBS
from .batch import Int32, Logprobs, PromptTargets

# Prompt tokens per slice of logits: 40 MB in float32 for a vocabulary of 151,936.
SLICE = 64


@dataclass(frozen=True)
class LogprobTensors:
    """`Logprobs` on the device, or being copied to the host."""

    at: Int32  # [l]
    chosen: torch.Tensor  # float32 [l]
    top_token_ids: torch.Tensor  # int32 [l, k]
    top: torch.Tensor  # float32 [l, k]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> LogprobTensors:
        """Return a copy with `move` applied to the tensors."""
        return LogprobTensors(self.at, *map(move, (self.chosen, self.top_token_ids, self.top)))

    def finished(self) -> Logprobs:
        """Convert to numpy; the tensors must be on the host, and their copies complete."""
        chosen, ids, top = (each.numpy() for each in (self.chosen, self.top_token_ids, self.top))
        return Logprobs(self.at, chosen, ids, top)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, at: Int32) -> LogprobTensors:
    """Return log probabilities and top-k tokens at l positions.

    Args:
        logits: [l, vocab_size].
        token_ids: int64 [l]; for -1 (no token), `chosen` is meaningless.
        at: [l] positions, passed through.

    It always computes MAX_LOGPROBS top tokens, so that results do not depend on what other
    requests of the step ask for.
    """
    scores = logits.to(torch.float32)
    logprobs = scores.log_softmax(dim=-1)  # batch-invariant: row by row
    ids = scores.topk(min(MAX_LOGPROBS, scores.shape[1]), dim=-1).indices
    chosen = logprobs.gather(1, token_ids.clamp(min=0)[:, None]).squeeze(1)
    return LogprobTensors(at, chosen, ids.to(torch.int32), logprobs.gather(1, ids))


def prompt_logprobs(
    logits_of: Callable[[torch.Tensor], torch.Tensor | None],
    targets: PromptTargets,
    device: torch.device,
) -> LogprobTensors | None:
    """Return log probabilities of prompt tokens, computed a slice at a time.

    `logits_of` returns the logits [l, vocab_size] at the step's tokens int64 [l], or None. Returns
    None on ranks other than 0. All ranks must be given the same targets.
    """
    parts = []
    for first in range(0, len(targets.at), SLICE):
        at = targets.at[first : first + SLICE].astype(np.int64)
        token_ids = targets.token_ids[first : first + SLICE].astype(np.int64)
        logits = logits_of(torch.from_numpy(at).to(device))
        if logits is not None:
            parts.append(token_logprobs(logits, torch.from_numpy(token_ids).to(device), targets.at))
    if not parts:
        return None
    chosen, ids, top = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("chosen", "top_token_ids", "top")
    )
    return LogprobTensors(targets.at, chosen, ids, top)
