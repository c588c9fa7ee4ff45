"""Tracks which routing prefixes a replica has cached, for reports to the router.

Each link of a request (`prefix.py`) is mapped to the hash of a KV block once that is known, and
each media digest to the keys of its encode units. Whether they are still cached is then looked up
in the block manager and the encoder cache.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...scheduler.request import EncodeUnit, Request, UnitKey
from ...scheduler.scheduler import Scheduler
from ..server.metadata import header_in
from .prefix import HASH_BYTES, Prefix

MAX_KNOWN = 8192  # links, and the same number of media; 64 KiB per report


@dataclass(eq=False)
class Expected:
    """A call whose prefix will be recorded."""

    request_id: str
    prefix: Prefix
    request: Request | None = None  # set between admission and the first response message


@dataclass(frozen=True)
class _Media:
    keys: tuple[UnitKey, ...]
    num_tokens: int


class Held:
    """Maps prefixes to cache keys.

    Used only on the event loop; reads state that the step thread writes.
    """

    def __init__(self, scheduler: Scheduler, block_size: int) -> None:
        self._scheduler, self._block_size = scheduler, block_size
        self._expected: dict[str, Expected] = {}  # by request_id, until it is admitted
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()  # link hash -> block hash
        self._media: OrderedDict[bytes, _Media] = OrderedDict()  # by digest

    def expect(self, request_id: str, prefix: Prefix) -> Expected:
        """Register a call before its request is admitted.

        If two calls have the same request id, only the first is registered: the second will be
        rejected.
        """
        call = Expected(request_id, prefix)
        self._expected.setdefault(request_id, call)
        return call

    def admitted(self, request_id: str, request: Request) -> None:
        """Attach an admitted request to its call; if it has several prompts, only the first."""
        for name in (request_id, header_in(request_id)):
            if name in self._expected:
                self._expected.pop(name).request = request
                return

    def answered(self, call: Expected) -> None:
        """Record the prefix of a call that has started to respond: its prompt is computed."""
        request, call.request = call.request, None
        if request is None or request.awaits_media:
            return
        prefix, items = call.prefix, _items(request)
        if len(items) == len(prefix.media):
            for digest, item in zip(prefix.media, items, strict=True):
                keys = tuple(unit.key for unit in item)
                _put(self._media, digest, _Media(keys, sum(unit.num_tokens for unit in item)))
            self._learn(prefix, request, [item[-1].end for item in items])

    def forget(self, call: Expected) -> None:
        """Unregister a finished call."""
        if self._expected.get(call.request_id) is call:
            del self._expected[call.request_id]

    def _learn(self, prefix: Prefix, request: Request, media_ends: list[int]) -> None:
        """Map each link to its last full block.

        A link's end is known in characters, so its number of text tokens is estimated from the
        share of characters.
        """
        num_media = sum(unit.num_tokens for unit in request.units)
        num_text = request.num_prompt_tokens - num_media
        tokens_of = [0, *_media_tokens(request)]
        hashes = request.block_hashes  # of cached blocks; the step thread appends to it
        for link in prefix.links:
            share = link.text_end / max(1, prefix.num_characters)
            tokens = int(num_text * share) + tokens_of[link.media_end]
            tokens = max(tokens, media_ends[link.media_end - 1] if link.media_end else 0)
            index = min(tokens, request.num_prompt_tokens) // self._block_size - 1
            if 0 <= index < len(hashes):
                _put(self._blocks, link.hash, hashes[index])

    def report(self) -> dict[str, Any]:
        """Return what is cached now, for `PrefixRouter`.

        `links`: concatenated hashes. `media`: number of tokens by digest.
        """
        blocks, encoder_cache = self._scheduler.blocks, self._scheduler.encoder_cache
        links = [link for link, known in self._blocks.items() if blocks.find(known) is not None]
        media = {
            digest: known.num_tokens
            for digest, known in self._media.items()
            if all(key in encoder_cache for key in known.keys)
        }
        return {"links": b"".join(links), "media": media}


def links_in(report: bytes) -> frozenset[bytes]:
    """Return the link hashes of a report."""
    return frozenset(report[at : at + HASH_BYTES] for at in range(0, len(report), HASH_BYTES))


def _items(request: Request) -> list[list[EncodeUnit]]:
    """Return the units of each image or video."""
    return [
        [unit for _, unit in group]
        for _, group in groupby(enumerate(request.units), key=lambda pair: pair[0] - pair[1].index)
    ]


def _media_tokens(request: Request) -> list[int]:
    """Return the total tokens of the first n images and videos, for n = 1, 2, ..."""
    sums, total = [], 0
    for item in _items(request):
        total += sum(unit.num_tokens for unit in item)
        sums.append(total)
    return sums


def _put(known: OrderedDict[bytes, Any], key: bytes, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MAX_KNOWN:
        known.popitem(last=False)
