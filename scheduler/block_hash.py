"""The hash of a KV block's content: what keys and values in it depend on, chained from the start.

A block's keys and values follow from its tokens, all tokens before it, and the pixels under its
placeholders. So its hash chains SHA-256 over the block before it (the first: the caller's salt),
its token ids, and of every encode unit that it overlaps the full media hash, the index and where
the unit lies. Two equal texts over different images share nothing past the image's first block.
"""

from __future__ import annotations

import struct
from array import array
from hashlib import sha256

from .request import EncodeUnit, Request, overlapping


def root_hash(cache_salt: bytes) -> bytes:
    """What the first block chains to: requests of different salts never share a block."""
    return sha256(b"octavo.kv.v1" + len(cache_salt).to_bytes(8, "little") + cache_salt).digest()


def next_hash(
    parent: bytes, tokens: array[int], units: tuple[EncodeUnit, ...], start: int, end: int
) -> bytes:
    """The hash of the full block that holds tokens [start, end)."""
    digest = sha256(parent)
    digest.update(tokens[start:end].tobytes())
    for unit in overlapping(units, start, end):
        place = struct.pack("<qqq", len(unit.media_hash), unit.index, unit.offset - start)
        digest.update(place + unit.media_hash)
    return digest.digest()


def block_hash(request: Request, index: int, block_size: int) -> bytes:
    """The hash of a request's block `index`, all of whose tokens are known; each is made once."""
    hashes = request.block_hashes
    while len(hashes) <= index:
        parent = hashes[-1] if hashes else root_hash(request.cache_salt)
        start = len(hashes) * block_size
        hashes.append(
            next_hash(parent, request.token_ids, request.units, start, start + block_size)
        )
    return hashes[index]
