"""What a step adds to single tokens' logits: biases, and tokens that may not be drawn now.

All of it is known when a step is planned, but for a row's own token where the step before draws it.
Only bad words of several tokens look at that: then the edit says after which token it holds, and
the workers, who have the token, see whether it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ..scheduler.request import Request
from .runner.batch import LogitEdits

ALWAYS = -1

Edit = tuple[int, int, float]  # after which token, of which token, what is added


def logit_edits(drawn: Sequence[tuple[Request, int]]) -> LogitEdits | None:
    """Of rows that sample: each request, and how many tokens it has with the row's last. None
    where no row has any."""
    edits = [
        (place, *edit)
        for place, (request, end) in enumerate(drawn)
        if request.has_edits
        for edit in _edits(request, end)
    ]
    if not edits:
        return None
    places, after, token_ids, bias = zip(*edits, strict=True)
    return LogitEdits(
        places=np.array(places, np.int32),
        after=np.array(after, np.int32),
        token_ids=np.array(token_ids, np.int32),
        bias=np.array(bias, np.float32),
    )


def _edits(request: Request, end: int) -> Iterator[Edit]:
    params = request.params
    for token, bias in params.biases:
        yield ALWAYS, token, bias
    if end - request.num_prompt_tokens < params.min_tokens:
        for token in request.stop_token_ids:
            yield ALWAYS, token, -math.inf
    for word in request.bad_words:
        yield from _word_edits(word, request, end)


def _word_edits(word: tuple[int, ...], request: Request, end: int) -> Iterator[Edit]:
    """Its last token may not come where the output ends with the others. Of those the last is the
    row's own token, which may not be known here."""
    *before, last = word
    if not before:
        yield ALWAYS, last, -math.inf
        return
    start = end - len(before)
    known = request.token_ids[start : end - 1] if start >= request.num_prompt_tokens else None
    if known is not None and known.tolist() == before[:-1]:
        yield before[-1], last, -math.inf
