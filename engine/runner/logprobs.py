"""Log probabilities of tokens by the model's own logits, and the likeliest tokens beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...scheduler.params import MAX_LOGPROBS
from .batch import Int32, Logprobs, PromptTargets

# Prompt tokens whose logits are there at once: at a vocabulary of 151,936, 40 MB in float32.
SLICE = 64


@dataclass(frozen=True)
class LogprobTensors:
    """`Logprobs` on their way from the device."""

    at: Int32  # [l]
    chosen: torch.Tensor  # float32 [l]
    top_token_ids: torch.Tensor  # int32 [l, k]
    top: torch.Tensor  # float32 [l, k]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> LogprobTensors:
        return LogprobTensors(self.at, *map(move, (self.chosen, self.top_token_ids, self.top)))

    def finished(self) -> Logprobs:
        """On the host, once they have arrived there."""
        chosen, ids, top = (each.numpy() for each in (self.chosen, self.top_token_ids, self.top))
        return Logprobs(self.at, chosen, ids, top)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, at: Int32) -> LogprobTensors:
    """Of `token_ids` int64 [l] by logits [l, vocab_size]; -1 is no token, and what is said of it
    means nothing.

    As many of the likeliest as anybody may ask for, whoever asks: so what is said to one does not
    depend on the others in the step.
    """
    scores = logits.to(torch.float32)
    logprobs = scores.log_softmax(dim=-1)  # a row's sum does not depend on the number of rows
    ids = scores.topk(min(MAX_LOGPROBS, scores.shape[1]), dim=-1).indices
    chosen = logprobs.gather(1, token_ids.clamp(min=0)[:, None]).squeeze(1)
    return LogprobTensors(at, chosen, ids.to(torch.int32), logprobs.gather(1, ids))


def prompt_logprobs(
    logits_of: Callable[[torch.Tensor], torch.Tensor | None],
    targets: PromptTargets,
    device: torch.device,
) -> LogprobTensors | None:
    """Of a prompt's tokens, few at a time; None but on rank 0. `logits_of` gives the logits of the
    step's tokens int64 [l]: all ranks must be given the same targets."""
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
