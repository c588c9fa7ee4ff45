"""Content hash of a KV block, chained from the start of the prompt.

Keys and values of a block depend on its tokens, all tokens before it, and the pixels behind image
placeholders. The hash is SHA-256 over the previous block's hash (for the first block: the
caller's salt), the token ids, and for each overlapping encode unit its full media hash, index and
relative offset. Equal texts with different images share no block from the image's first one on.
"""

from __future__ import annotations

import struct
from array import array
from hashlib import sha256

from .request import EncodeUnit, Request, overlapping


def root_hash(cache_salt: bytes) -> bytes:
    """Return the parent hash of first blocks. Different salts never share a block."""
    return sha256(b"octavo.kv.v1" + len(cache_salt).to_bytes(8, "little") + cache_salt).digest()


def next_hash(
    parent: bytes, tokens: array[int], units: tuple[EncodeUnit, ...], start: int, end: int
) -> bytes:
    """Return the hash of the full block of tokens [start, end)."""
    digest = sha256(parent)
    digest.update(tokens[start:end].tobytes())
    for unit in overlapping(units, start, end):
        position = struct.pack("<qqq", len(unit.media_hash), unit.index, unit.offset - start)
        digest.update(position + unit.media_hash)
    return digest.digest()


def block_hash(request: Request, index: int, block_size: int) -> bytes:
    """Return the hash of the request's full block `index`; hashes are cached."""
    hashes = request.block_hashes
    while len(hashes) <= index:
        parent = hashes[-1] if hashes else root_hash(request.cache_salt)
        start = len(hashes) * block_size
        hashes.append(
            next_hash(parent, request.token_ids, request.units, start, start + block_size)
        )
    return hashes[index]
