"""What a step adds to single tokens' logits: biases, and tokens that may not be drawn now.

All of it is known when a step is planned, but for a row's own token where the step before draws it.
Only bad words of several tokens look at that: then the edit says after which token it holds, and
the workers, who have the token, see whether it does.
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
    """`LogitEdits` as they come; the places are told once for all of a row's."""

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


def logit_edits(drawn: Sequence[tuple[Request, int]]) -> LogitEdits | None:
    """Of rows that sample: each request, and how many tokens it has with the row's last. None
    where no row has any."""
    edits = _Columns()
    for place, (request, end) in enumerate(drawn):
        if request.has_edits:
            _add_biases(edits, request)
            is_early = end - request.num_prompt_tokens < request.params.min_tokens
            if is_early and not request.is_guided:  # those have it in their masks
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
    """All at once: there may be a thousand."""
    edits.after.extend(array("i", [ALWAYS]) * len(request.biases))
    edits.token_ids.extend(request.biased_token_ids)
    edits.bias.extend(request.biases)


def _add_words(edits: _Columns, request: Request, end: int) -> None:
    """A word's last token may not come where the output ends with the others. Of those the last is
    the row's own token, which may not be known here."""
    token_ids, num_prompt_tokens = request.token_ids, request.num_prompt_tokens
    for word in request.bad_words:
        start = end + 1 - len(word)
        if start < num_prompt_tokens:  # the output is too short
            continue
        if len(word) > 2:
            is_near = token_ids[end - 2] == word[-3]  # mostly not, and then the rest is spared
            if not is_near or tuple(token_ids[start : end - 1]) != word[:-2]:
                continue
        edits.add(word[-2] if len(word) > 1 else ALWAYS, word[-1], -math.inf)
