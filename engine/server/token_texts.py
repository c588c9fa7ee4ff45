"""Token ids as bytes and as text, without loss: a byte-level token may be part of a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer


class TokenTexts:
    """What each token of a tokenizer adds to the text. Caches every token that is asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = frozenset(token for token, each in added if each.special)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, special or not; none for an id that has no token."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._read(token)
        return found

    def text_of(self, token: int) -> str:
        """Return a token's text; a part of a character is written as `\\xe2\\x80`."""
        return _text(self.bytes_of(token), "")

    def key_of(self, token: int) -> str:
        """Return a name for a token as OpenAI's completions have it: `bytes:\\xe2\\x80` where it
        is a part of a character, else its text."""
        return _text(self.bytes_of(token), "bytes:")

    def offsets(self, skip_special_tokens: bool) -> TextOffsets:
        """Return a counter of offsets for one answer's tokens."""
        return TextOffsets(self, self._special if skip_special_tokens else frozenset())

    def _read(self, token: int) -> bytes:
        spelled = self._tokenizer.id_to_token(token)
        if spelled is None:
            return b""
        if not self._is_byte_level:
            return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()
        try:
            return bytes(_BYTE_OF[character] for character in spelled)
        except KeyError:  # an added token, in plain characters
            return str(spelled).encode()


class TextOffsets:
    """Characters of an answer's text before each of its tokens, in order."""

    def __init__(self, texts: TokenTexts, skipped: frozenset[int]) -> None:
        self._texts, self._skipped = texts, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = 0

    def of(self, token_ids: Iterable[int]) -> Iterator[int]:
        """Yield the offset of each token; one inside a character has that character's."""
        for token in token_ids:
            data = b"" if token in self._skipped else self._texts.bytes_of(token)
            start = self._next
            if data:
                start += len(self._decoder.decode(data[:1]))
                is_open = bool(self._decoder.getstate()[0])
                self._next = start + len(self._decoder.decode(data[1:]))
                start -= not is_open  # the first byte's character was counted
            yield start


def _text(data: bytes, prefix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)


def _byte_characters() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte.

    Printable bytes stand for themselves, the others for U+0100 on, in order (GPT-2's table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
