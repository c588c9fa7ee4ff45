"""Incremental detokenization: token ids to text, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Makes text of one request's tokens as they come, and finds its stop strings.

    Text that may still turn into a stop string, and bytes that are not yet a whole character, are
    held back until they are decided. No stop string is looked for in the text of the first
    `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """`include_stop`: the stop string that is found is shown."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decode = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop, self._include_stop = tuple(stop), include_stop
        self._begun = [0] * len(self._stop)  # characters of each that the text so far ends with
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._decoded = 0  # characters decoded so far, held back or not
        self._held = ""
        self.stopped = False  # a stop string was found; nothing follows it

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` add, up to a stop string."""
        if len(token_ids) == 1 and not self._stop:  # one of each step's many: nothing is held
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
        """What was held back, when the output ends for another reason than a stop string."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._token_ids, self._skip_special_tokens)
        text = self._release(whole[self._decoded :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        """Adds `text` to what is held and gives out what cannot be part of a stop string."""
        if self.stopped:
            return ""
        more, text = len(text), self._held + text
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            at, stop = min(found)
            return text[: at + len(stop) * self._include_stop]
        # None is begun by more than before: else each token would go through all of each.
        pairs = zip(self._stop, self._begun, strict=True)
        self._begun = [_overlap(text, stop, begun + more) for stop, begun in pairs]
        keep = max(self._begun, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str, most: int) -> int:
    """Length of the longest end of `text` that begins `stop`; it is known to be at most `most`."""
    for size in range(min(len(text), len(stop) - 1, most), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
