"""What a prompt begins with, in hashes that are made before anything of it is read.

Whoever routes a request has neither its tokens (that takes the checkpoint's tokenizer) nor its
pixels (that takes decoding). So the prompt as it came is cut into pieces - a message's role, a text
or 256 characters of it, an image's or a video's source - and each piece's hash chains the one
before it, as the hashes of KV blocks do (`scheduler/block_hash.py`). A replica knows which block of
its KV cache each of these links stands for (`held.py`), so that what it says it holds is the block
manager's word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

PIECE = 256  # characters of text
MAX_LINKS = 1024  # of a prompt: more of it tells replicas apart no better
HASH_BYTES = 8  # of a link that are kept: a collision costs a detour
KINDS = ("image", "video")
Atom = tuple[str, Any]  # ("role" | "text" | "image" | "video", what it is)


@dataclass(frozen=True)
class Link:
    """The prompt up to the end of one piece."""

    hash: bytes
    text_end: int  # characters of text up to there
    media_end: int  # images and videos up to there


@dataclass(frozen=True)
class Prefix:
    """What a request is routed by."""

    links: tuple[Link, ...] = ()
    media: tuple[bytes, ...] = ()  # the digest of each image's or video's source and options
    num_characters: int = 0  # of all its text


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
        if kind != "role":  # a role alone all requests share
            link = Link(self.last[:HASH_BYTES], self.num_characters, len(self.media))
            self.links.append(link)


def prefix_of(prompt: Mapping[str, Any], cache_salt: str = "") -> Prefix:
    """Of a prompt as `AsyncLLM.generate` takes it. Requests of other salts share nothing."""
    root = _framed(b"octavo.route.v1", cache_salt.encode("utf-8", "surrogatepass"))
    chain = _Chain(sha256(root).digest())
    for kind, what in _atoms(prompt):
        if kind in KINDS:
            digest = sha256(root + b"".join(_fed(what))).digest()[:HASH_BYTES]
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


def _atoms(prompt: Mapping[str, Any]) -> Iterator[Atom]:
    """In prompt order, but for media that are given apart from the text: those come first."""
    for kind in KINDS:
        for source in prompt.get(f"{kind}s") or ():
            yield kind, source
    for message in prompt.get("messages") or ():
        if not isinstance(message, Mapping):
            continue
        yield "role", str(message.get("role"))
        content = message.get("content")
        yield from _parts([content] if isinstance(content, str) else content)
    if "prompt" in prompt:
        yield "text", str(prompt["prompt"])
    if "prompt_token_ids" in prompt:
        yield "text", ",".join(map(str, prompt["prompt_token_ids"]))


def _parts(content: Any) -> Iterator[Atom]:
    for part in content if isinstance(content, Sequence) else ():
        if isinstance(part, str):
            yield "text", part
        elif isinstance(part, Mapping):
            kind = next((kind for kind in KINDS if kind in part), "text")
            yield (kind, part) if kind in KINDS else ("text", str(part.get("text", "")))


def _fed(value: Any) -> Iterator[bytes]:
    """A source's bytes, each kind of value told apart; of arrays the shape and the numbers."""
    if isinstance(value, bytes | bytearray | memoryview):
        yield _framed(b"b", bytes(value))
    elif isinstance(value, str):
        yield _framed(b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield _framed(b"k", str(name).encode("utf-8", "surrogatepass"))
            yield from _fed(value[name])
        yield b"}"
    elif isinstance(value, Sequence):
        for each in value:
            yield from _fed(each)
        yield b"]"
    elif hasattr(value, "tobytes") and hasattr(value, "shape"):
        yield _framed(b"a", str(value.shape).encode()) + _framed(b"b", value.tobytes())
    else:
        yield _framed(b"r", str(value).encode("utf-8", "surrogatepass"))


def _framed(tag: bytes, data: bytes) -> bytes:
    return tag + len(data).to_bytes(8, "little") + data
