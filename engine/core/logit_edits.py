"""Edits of single logits: logit_bias, bad words, and stop tokens before `min_tokens`.

All edits are known when a step is planned, except that a row's previous token may still be in
flight. Only bad words of several tokens depend on it: such an edit names the required previous
token, and the workers apply it if that token was sampled.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...scheduler.request import Request
from ..runner.batch import LogitEdits

ALWAYS = -1


def _int32() -> array[int]:
    return array("i")


@dataclass
class _Columns:
    """Builder of `LogitEdits`. Row indices are appended once per row."""

    places: array[int] = field(default_factory=_int32)
    after: array[int] = field(default_factory=_int32)
    token_ids: array[int] = field(default_factory=_int32)
    bias: array[float] = field(default_factory=lambda: array("f"))

    def add(self, after: int, token_id: int, bias: float) -> None:
        self.after.append(after)
        self.token_ids.append(token_id)
        self.bias.append(bias)

    def close_row(self, place: int) -> None:
        self.places.extend(array("i", [place]) * (len(self.token_ids) - len(self.places)))


def logit_edits(sampled: Sequence[tuple[Request, int]]) -> LogitEdits | None:
    """Return the logit edits of a step; None if no row has any.

    `sampled`: for each row that samples, its request and the number of tokens up to and including
    the row's last.
    """
    edits = _Columns()
    for place, (request, end) in enumerate(sampled):
        if request.has_edits:
            _add_biases(edits, request)
            is_early = end - request.num_prompt_tokens < request.params.min_tokens
            if is_early and not request.is_guided:  # Grammar masks handle min_tokens themselves.
                for token in request.stop_token_ids:
                    edits.add(ALWAYS, token, -math.inf)
            _add_words(edits, request, end)
            edits.close_row(place)
    if not edits.places:
        return None
    places, after, token_ids = (
        np.frombuffer(each, np.int32) for each in (edits.places, edits.after, edits.token_ids)
    )
    return LogitEdits(places, after, token_ids, np.frombuffer(edits.bias, np.float32))


def _add_biases(edits: _Columns, request: Request) -> None:
    """Add all biases of a request in bulk, since there may be a thousand."""
    edits.after.extend(array("i", [ALWAYS]) * len(request.biases))
    edits.token_ids.extend(request.biased_token_ids)
    edits.bias.extend(request.biases)


def _add_words(edits: _Columns, request: Request, end: int) -> None:
    """Forbid a bad word's last token if the output ends with its other tokens.

    The output's last token may still be in flight, so the workers compare that one.
    """
    token_ids, num_prompt_tokens = request.token_ids, request.num_prompt_tokens
    for word in request.bad_words:
        start = end + 1 - len(word)
        if start < num_prompt_tokens:  # the output is too short
            continue
        if len(word) > 2:
            is_near = token_ids[end - 2] == word[-3]  # cheap test that is rarely true
            if not is_near or tuple(token_ids[start : end - 1]) != word[:-2]:
                continue
        edits.add(word[-2] if len(word) > 1 else ALWAYS, word[-1], -math.inf)
