"""A token's log probability, and the likeliest tokens at its place."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload


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


NO_TOKEN = -1  # the token id of an entry that is None


class LogprobTable(Sequence[TokenLogprobs | None]):
    """Log probabilities of consecutive tokens, held in arrays.

    Takes 20 bytes a token and 8 an alternative; as a list of `TokenLogprobs` they take over 300
    bytes a token. Equal to any sequence of equal entries.
    """

    def __init__(self, entries: Iterable[TokenLogprobs | None] = ()) -> None:
        self._token_ids = array("i")
        self._logprobs = array("d")
        self._ends = array("q")  # of each token's alternatives in the two arrays that follow
        self._top_token_ids = array("i")
        self._top_logprobs = array("f")
        self.extend(entries)

    def append(self, entry: TokenLogprobs | None) -> None:
        if entry is not None:
            self._top_token_ids.extend(entry.top_token_ids)
            self._top_logprobs.extend(entry.top_logprobs)
        self._token_ids.append(NO_TOKEN if entry is None else entry.token_id)
        self._logprobs.append(0.0 if entry is None else entry.logprob)
        self._ends.append(len(self._top_token_ids))

    def extend(self, entries: Iterable[TokenLogprobs | None]) -> None:
        if not isinstance(entries, LogprobTable):
            for entry in entries:
                self.append(entry)
            return
        first = len(self._top_token_ids)
        self._token_ids.extend(entries._token_ids)
        self._logprobs.extend(entries._logprobs)
        self._ends.extend(array("q", [first + end for end in entries._ends]))
        self._top_token_ids.extend(entries._top_token_ids)
        self._top_logprobs.extend(entries._top_logprobs)

    def __len__(self) -> int:
        return len(self._token_ids)

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, index: slice) -> LogprobTable: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | LogprobTable | None:
        if isinstance(index, slice):
            return LogprobTable(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        token = self._token_ids[index]
        if token == NO_TOKEN:
            return None
        start, end = self._ends[index - 1] if index else 0, self._ends[index]
        top = self._top_token_ids[start:end], self._top_logprobs[start:end]
        return TokenLogprobs(token, self._logprobs[index], *top)

    def __iter__(self) -> Iterator[TokenLogprobs | None]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LogprobTable({list(self)!r})"
