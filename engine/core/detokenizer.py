"""Incremental detokenization: token ids to text, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Incremental detokenizer of one answer, with stop string detection.

    Text that may be the start of a stop string, and incomplete UTF-8 sequences, are held back
    until they are resolved. The text of the first `min_tokens` tokens is not searched.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Create a stream. `include_stop`: include the matched stop string in the text."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decode = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop, self._include_stop = tuple(stop), include_stop
        # Per stop string, the length of its prefix that the text ends with.
        self._matched = [0] * len(self._stop)
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._decoded = 0  # characters decoded so far, including held text
        self._held = ""
        self.stopped = False  # A stop string was found; no text follows it.

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` add, up to a stop string."""
        if len(token_ids) == 1 and not self._stop:  # fast path: no text is held
            self._token_ids.append(token_ids[0])
            piece = self._decode.step(self._tokenizer, token_ids[0]) or ""
            self._decoded += len(piece)
            return piece
        early, text = "", ""
        for token in token_ids:
            self._token_ids.append(token)
            piece = self._decode.step(self._tokenizer, token) or ""
            if len(self._token_ids) <= self._min_tokens:
                early += piece
            else:
                text += piece
        self._decoded += len(early) + len(text)
        return early + self._release(text)

    def flush(self) -> str:
        """Return held text at the end of the output, unless a stop string ended it."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._token_ids, self._skip_special_tokens)
        text = self._release(whole[self._decoded :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        """Append to the held text, and return what cannot be part of a stop string."""
        if self.stopped:
            return ""
        more, text = len(text), self._held + text
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            at, stop = min(found)
            return text[: at + len(stop) * self._include_stop]
        # A match grows by at most `more` characters; the bound keeps the cost per token small.
        pairs = zip(self._stop, self._matched, strict=True)
        self._matched = [_overlap(text, stop, matched + more) for stop, matched in pairs]
        keep = max(self._matched, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str, most: int) -> int:
    """Return the length, at most `most`, of the longest suffix of `text` that starts `stop`."""
    for size in range(min(len(text), len(stop) - 1, most), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
