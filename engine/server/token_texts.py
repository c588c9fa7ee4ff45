"""Lossless bytes and text of single tokens; a byte-level token may be part of a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer


class TokenTexts:
    """Bytes and text of a tokenizer's tokens, cached per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = frozenset(token for token, each in added if each.special)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, special or not; empty for an unknown id."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._read(token)
        return found

    def text_of(self, token: int) -> str:
        """Return a token's text; an incomplete character is escaped as `\\xe2\\x80`."""
        return _text(self.bytes_of(token), "")

    def key_of(self, token: int) -> str:
        """Return a token's name in OpenAI's completions.

        That is its text, or `bytes:\\xe2\\x80` for an incomplete character.
        """
        return _text(self.bytes_of(token), "bytes:")

    def offsets(self, skip_special_tokens: bool) -> TextOffsets:
        """Return an offset counter for the tokens of one output."""
        return TextOffsets(self, self._special if skip_special_tokens else frozenset())

    def _read(self, token: int) -> bytes:
        spelled = self._tokenizer.id_to_token(token)
        if spelled is None:
            return b""
        if not self._is_byte_level:
            return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()
        try:
            return bytes(_BYTE_OF[character] for character in spelled)
        except KeyError:  # an added token, stored as plain text
            return str(spelled).encode()


class TextOffsets:
    """Computes each output token's character offset, in order."""

    def __init__(self, texts: TokenTexts, skipped: frozenset[int]) -> None:
        self._texts, self._skipped = texts, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = 0

    def of(self, token_ids: Iterable[int]) -> Iterator[int]:
        """Yield each token's offset. A token that continues a character has that character's."""
        for token in token_ids:
            data = b"" if token in self._skipped else self._texts.bytes_of(token)
            start = self._next
            if data:
                start += len(self._decoder.decode(data[:1]))
                is_open = bool(self._decoder.getstate()[0])
                self._next = start + len(self._decoder.decode(data[1:]))
                start -= not is_open  # the first byte completed a character
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
