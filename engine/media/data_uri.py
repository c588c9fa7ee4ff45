"""Parse data URIs (RFC 2397) as browsers do."""

from __future__ import annotations

import binascii
import re

import numpy as np

from ...scheduler.params import truncated_repr
from ..config.media_limits import MediaLimits
from ..errors import InputError
from .source_text import BLANKS

CHUNK = 1 << 20  # bytes to percent-decode at a time
MAX_HEAD = 4096  # characters before the comma (media type and parameters)
_BASE64_MARK = re.compile(r";[ \t\r\n]*base64[ \t\r\n]*\Z", re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_HEX = np.full(256, -1, np.int16)
for _value, _letters in enumerate(zip("0123456789abcdef", "0123456789ABCDEF", strict=True)):
    _HEX[[ord(_letter) for _letter in _letters]] = _value


def read_data_uri(uri: str, limits: MediaLimits, field: str) -> bytes:
    """Return the data of a URI; its media type is ignored, since the content shows the format.

    Raises `InputError` if the URI is too long or malformed.
    """
    most = 3 * limits.max_media_bytes + MAX_HEAD  # every byte may be written as %XX
    if len(uri) > most:
        limits.refuse("max_media_bytes", field, f"a data URI of {len(uri)} characters")
    at = uri.find(",", 0, MAX_HEAD)
    if at < 0:
        text = "a data URI must be data:<type>;base64,<data>; the comma is missing"
        raise InputError(field, f"{truncated_repr(uri[:64])}: {text}")
    head, body = uri[:at], uri[at + 1 :]
    data = percent_decoded(body.encode("utf-8", "surrogatepass"))
    if _BASE64_MARK.search(head):
        return _from_base64(data, field)
    return data


def percent_decoded(data: bytes) -> bytes:
    """Replace each %XX by one byte; keep a % that two hexadecimal digits do not follow."""
    if b"%" not in data:
        return data
    pieces, start = [], 0
    while start < len(data):
        end = min(start + CHUNK, len(data))
        cut = data.rfind(b"%", max(start + 1, end - 2), end) if end < len(data) else -1
        end = cut if cut > 0 else end  # do not split an escape
        pieces.append(_percent_decoded(data[start:end]))
        start = end
    return b"".join(pieces)


def _percent_decoded(data: bytes) -> bytes:
    letters = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(letters[:-2] == ord("%"))
    high, low = _HEX[letters[at + 1]], _HEX[letters[at + 2]]
    is_escape = (high >= 0) & (low >= 0)
    at = at[is_escape]
    decoded, is_kept = letters.copy(), np.ones(len(letters), bool)
    decoded[at] = (high[is_escape] << 4 | low[is_escape]).astype(np.uint8)
    is_kept[at + 1] = is_kept[at + 2] = False
    return decoded[is_kept].tobytes()


def _from_base64(data: bytes, field: str) -> bytes:
    """Decode base64; accept the URL-safe alphabet, missing padding and whitespace."""
    letters = data.translate(_URL_SAFE, BLANKS.encode())
    bare = letters.rstrip(b"=")
    if len(letters) - len(bare) <= 2 and len(bare) % 4 != 1:
        try:
            padded = bare + b"=" * (-len(bare) % 4)
            return binascii.a2b_base64(padded, strict_mode=True)
        except binascii.Error:
            pass
    raise InputError(field, "the data after 'base64,' in the data URI is not valid base64")
