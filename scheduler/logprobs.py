"""Log probabilities of a token and of the top-k tokens at its position."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload


class TokenLogprobs(NamedTuple):
    """Log probabilities from the model's raw logits: before penalties, bias and temperature.

    Ties in the top-k order are broken by the lower token id.
    """

    token_id: int
    logprob: float
    top_token_ids: array[int]  # most likely first
    top_logprobs: array[float]

    @property
    def top(self) -> dict[int, float]:
        """Return the top-k tokens as {token id: logprob}, most likely first."""
        return dict(zip(self.top_token_ids, self.top_logprobs, strict=True))


NO_TOKEN = -1  # token id of a None entry


class LogprobTable(Sequence[TokenLogprobs | None]):
    """Log probabilities of consecutive tokens, stored in arrays.

    Takes 20 bytes per token and 8 per alternative, where a list of `TokenLogprobs` takes over 300
    bytes per token. Compares equal to any sequence of equal entries.
    """

    def __init__(self, entries: Iterable[TokenLogprobs | None] = ()) -> None:
        self._token_ids = array("i")
        self._logprobs = array("d")
        self._ends = array("q")  # end of each token's top-k entries in the next two arrays
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
