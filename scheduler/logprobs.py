"""A token's log probability, and the likeliest tokens at its place."""

from __future__ import annotations

from array import array
from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """By the model's own logits: before penalties, bias, temperature and filters.

    Of equal ones the lower token id is the likelier.
    """

    token_id: int
    logprob: float
    top_token_ids: array[int]  # as many as were asked for, the likeliest first
    top_logprobs: array[float]

    @property
    def top(self) -> dict[int, float]:
        """The likeliest tokens, the likeliest first."""
        return dict(zip(self.top_token_ids, self.top_logprobs, strict=True))
