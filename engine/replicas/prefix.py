"""Prefix hashes of prompts for routing, computed without tokenizing or decoding.

The ingress has neither the checkpoint's tokenizer nor decoded pixels. So it splits the raw prompt
into pieces (a message's role, up to 256 characters of text, or a media source) and chains their
hashes, like those of KV blocks (`scheduler/block_hash.py`). A replica maps each of these links to a
block of its KV cache (`held.py`), so its reports reflect what the block manager really has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from ..input.conversation import Conversation
from ..input.parsed_prompt import ParsedPrompt

PIECE = 256  # characters of text
MAX_LINKS = 1024  # per prompt; longer prefixes do not improve routing
HASH_BYTES = 8  # per link; a collision only costs a suboptimal route
KINDS = ("image", "video")
Atom = tuple[str, Any]  # ("role" | "text" | "image" | "video", value)


@dataclass(frozen=True)
class Link:
    """A prefix of the prompt that ends with one piece."""

    hash: bytes
    text_end: int  # characters of text in the prefix
    media_end: int  # images and videos in the prefix


@dataclass(frozen=True)
class Prefix:
    """The routing key of a request."""

    links: tuple[Link, ...] = ()
    media: tuple[bytes, ...] = ()  # digests of media sources with their options
    num_characters: int = 0  # of all text


@dataclass
class _Chain:
    last: bytes
    links: list[Link] = field(default_factory=list)
    media: list[bytes] = field(default_factory=list)
    num_characters: int = 0

    def add(self, kind: str, piece: bytes) -> None:
        if len(self.links) == MAX_LINKS:
            return
        self.last = sha256(self.last + _framed(kind.encode(), piece)).digest()
        if kind != "role":  # all requests share a bare role
            link = Link(self.last[:HASH_BYTES], self.num_characters, len(self.media))
            self.links.append(link)


def prefix_of(prompt: ParsedPrompt, cache_salt: str = "") -> Prefix:
    """Return the prefix of a prompt for `AsyncLLM.generate`. Different salts share no hashes."""
    root = _framed(b"octavo.route.v1", cache_salt.encode("utf-8", "surrogatepass"))
    chain = _Chain(sha256(root).digest())
    for kind, what in _atoms(prompt):
        if kind in KINDS:
            digest = sha256(root + b"".join(_hash_input(what))).digest()[:HASH_BYTES]
            chain.media.append(digest)
            chain.add(kind, digest)
        elif kind == "role":
            chain.add(kind, what.encode("utf-8", "surrogatepass"))
        else:
            for start in range(0, len(what), PIECE):
                piece = what[start : start + PIECE]
                chain.num_characters += len(piece)
                chain.add(kind, piece.encode("utf-8", "surrogatepass"))
    return Prefix(tuple(chain.links), tuple(chain.media), chain.num_characters)


def _atoms(prompt: ParsedPrompt) -> Iterator[Atom]:
    """Yield the parts in prompt order, after media that are passed separately."""
    for kind, sources in (("image", prompt.images), ("video", prompt.videos)):
        for source in sources:
            yield kind, source
    body = prompt.body
    if isinstance(body, Conversation):
        yield from body.atoms()
    else:
        yield "text", body if isinstance(body, str) else ",".join(map(str, body))


def _hash_input(value: Any) -> Iterator[bytes]:
    """Yield the bytes of a source to hash, with a type tag for each value."""
    if isinstance(value, bytes | bytearray | memoryview):
        yield _framed(b"b", bytes(value))
    elif isinstance(value, str):
        yield _framed(b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield _framed(b"k", str(name).encode("utf-8", "surrogatepass"))
            yield from _hash_input(value[name])
        yield b"}"
    elif isinstance(value, Sequence):
        for each in value:
            yield from _hash_input(each)
        yield b"]"
    elif hasattr(value, "tobytes") and hasattr(value, "shape"):
        yield _framed(b"a", str(value.shape).encode()) + _framed(b"b", value.tobytes())
    else:
        yield _framed(b"r", str(value).encode("utf-8", "surrogatepass"))


def _framed(tag: bytes, data: bytes) -> bytes:
    return tag + len(data).to_bytes(8, "little") + data
