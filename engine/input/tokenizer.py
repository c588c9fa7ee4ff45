"""Tokenization of template output, with special tokens, and of user text, without."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ..config.json_files import read_text
from ..errors import ConfigError, TooLong
from .pieces import can_cut, pieces

MAX_TOKENIZER_BYTES = 256 << 20
WINDOW = 1 << 16  # characters per search for added tokens, which holds the GIL


@dataclass
class TextBudget:
    """Token limit of one request's text, and cancellation when the request ends."""

    max_tokens: int
    check: Callable[[], None] = lambda: None  # raises once the request has ended
    num_tokens: int = 0
    num_characters: int = 0  # encoded, including added tokens

    def take(self, num_tokens: int, num_characters: int) -> None:
        """Count encoded text. Raises `TooLong` once the total exceeds the limit."""
        self.num_tokens += num_tokens
        self.num_characters += num_characters
        if self.num_tokens > self.max_tokens:
            raise TooLong(
                "prompt",
                f"the first {self.num_characters} characters have {self.num_tokens} tokens, over "
                f"max_model_len={self.max_tokens}; shorten the text, or raise max_model_len",
            )


class TextTokenizer:
    """Tokenizer of a checkpoint's `tokenizer.json`.

    `backend` parses added tokens such as `<|im_end|>`; a second tokenizer without them encodes
    user text. Text is encoded in pieces and without the GIL.
    """

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        try:
            raw = json.loads(read_text(path, MAX_TOKENIZER_BYTES))
            self.longest = max(map(len, raw["model"]["vocab"]))  # bytes of one token
            self.added = {token["content"]: token["id"] for token in raw["added_tokens"]}
            whole = {**raw, "truncation": None, "padding": None}
            self.backend = Tokenizer.from_str(json.dumps(whole))
            self._plain = Tokenizer.from_str(json.dumps({**whole, "added_tokens": []}))
            self._cuts = can_cut(raw)
        except FileNotFoundError:
            text = f"{path}: no such file; add the checkpoint's tokenizer"
            raise ConfigError(text) from None
        except ConfigError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exception
            raise ConfigError(f"{path}: not a valid tokenizer: {error}") from None
        options = ("normalized", "lstrip", "rstrip", "single_word")
        self._splits_added = not any(
            token.get(option) for token in raw["added_tokens"] for option in options
        )
        longest_first = sorted(self.added, key=len, reverse=True)
        self._longest_added = max(map(len, self.added), default=1)
        self._find_added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)").search

    def encode_plain(self, text: str, budget: TextBudget | None = None) -> list[int]:
        """Return the ids of plain text, without parsing added tokens.

        Raises `TooLong` over the budget.
        """
        return self._encode(self._plain, text, self._cuts, budget)

    def encode_marked(self, text: str, budget: TextBudget | None = None) -> list[int]:
        """Return the ids of a raw prompt, in which added tokens are parsed.

        Raises `TooLong` over the budget.
        """
        if not self._splits_added:  # Options of added tokens depend on the surrounding text.
            return self._encode(self.backend, text, False, budget)
        token_ids: list[int] = []
        for part, token in self.split_added(text):
            token_ids += self.encode_plain(part, budget)
            if token:
                token_ids.append(self.added[token])
                if budget is not None:
                    budget.take(1, len(token))
        return token_ids

    def split_added(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield each plain text with the added token that follows it, "" after the last one."""
        start = at = 0
        while at < len(text):
            end = at + WINDOW
            found = self._find_added(text, at, end + self._longest_added - 1)
            if found is None or found.start() >= end:  # a match past `end` may be truncated
                at = end
                continue
            yield text[start : found.start()], found[0]
            start = at = found.end()
        yield text[start:], ""

    def has_added(self, text: str) -> bool:
        """Return whether the text spells an added token."""
        return next(self.split_added(text))[1] != ""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids. Releases the GIL, which `Tokenizer.decode` does not."""
        return self.backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    @staticmethod
    def _encode(
        tokenizer: Tokenizer, text: str, cuts: bool, budget: TextBudget | None
    ) -> list[int]:
        """Encode text piece by piece.

        Unlike `encode`, `encode_batch_fast` releases the GIL; a batch of one text uses one core.
        """
        token_ids: list[int] = []
        for piece in pieces(text, cuts, "prompt"):
            if budget is not None:
                budget.check()
            (found,) = tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            token_ids += found.ids
            if budget is not None:
                budget.take(len(found), len(piece))
        return token_ids
