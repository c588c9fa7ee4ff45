"""Text to token ids: text that a template issued, and text that a user wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from ..config import ConfigError
from ..json_files import read_text

MAX_TOKENIZER_BYTES = 256 << 20


class TextTokenizer:
    """A checkpoint's `tokenizer.json`.

    `backend` knows the added tokens (`<|im_end|>` and its kind); a second tokenizer without them
    encodes what is plain text whatever it spells.
    """

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        try:
            text = read_text(path, MAX_TOKENIZER_BYTES)
            raw = json.loads(text)
            self.longest = max(map(len, raw["model"]["vocab"]))  # characters of one token
            self.added = {token["content"]: token["id"] for token in raw["added_tokens"]}
            self.backend = Tokenizer.from_str(text)
            self._plain = Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a checkpoint needs its tokenizer") from None
        except ConfigError:
            raise
        except Exception as error:  # what `tokenizers` raises is a plain Exception
            raise ConfigError(f"{path}: not a tokenizer: {error}") from None
        longest_first = sorted(self.added, key=len, reverse=True)
        self.split_added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of plain text: an added token's spelling means nothing."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a raw prompt, in which added tokens are parsed."""
        return self.backend.encode(text, add_special_tokens=False).ids
