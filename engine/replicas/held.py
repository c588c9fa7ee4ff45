"""What a replica holds of the prompts that it has answered: its word for the router.

A request's links (`prefix.py`) are set beside the hashes of its KV blocks once they are known, and
its media's digests beside the keys of its encode units. From then on the block manager and the
encoder cache say whether a link or a digest is still worth coming here for.
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

MAX_KNOWN = 8192  # links, and as many media: 64 KiB of a report


@dataclass(eq=False)
class Expected:
    """A call whose prompt is to be learned."""

    request_id: str
    prefix: Prefix
    request: Request | None = None  # from when it is admitted until it has begun to answer


@dataclass(frozen=True)
class _Media:
    keys: tuple[UnitKey, ...]
    num_tokens: int


class Held:
    """Used on the event loop alone; it only looks at what the step thread writes."""

    def __init__(self, scheduler: Scheduler, block_size: int) -> None:
        self._scheduler, self._block_size = scheduler, block_size
        self._expected: dict[str, Expected] = {}  # by request_id, until it is admitted
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()  # link: block_hash
        self._media: OrderedDict[bytes, _Media] = OrderedDict()  # by digest

    def expect(self, request_id: str, prefix: Prefix) -> Expected:
        """That request is to come. Of two calls by one name it is the first: the other is refused,
        and its end is not the first one's."""
        call = Expected(request_id, prefix)
        self._expected.setdefault(request_id, call)
        return call

    def admitted(self, request_id: str, request: Request) -> None:
        """Learn of a request. Of several prompts in one call the first is expected."""
        for name in (request_id, header_in(request_id)):
            if name in self._expected:
                self._expected.pop(name).request = request
                return

    def answered(self, call: Expected) -> None:
        """It has an answer, or the beginning of one: its prompt is computed."""
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
        """It is over, however it ended."""
        if self._expected.get(call.request_id) is call:
            del self._expected[call.request_id]

    def _learn(self, prefix: Prefix, request: Request, media_ends: list[int]) -> None:
        """A link's last full block. Where text ends within the prompt is known of its characters,
        not of its tokens: so many of the text's tokens are taken as it has of its characters."""
        num_media = sum(unit.num_tokens for unit in request.units)
        num_text = request.num_prompt_tokens - num_media
        tokens_of = [0, *_media_tokens(request)]
        hashes = request.block_hashes  # of the blocks that are sealed: the step thread's list
        for link in prefix.links:
            share = link.text_end / max(1, prefix.num_characters)
            tokens = int(num_text * share) + tokens_of[link.media_end]
            tokens = max(tokens, media_ends[link.media_end - 1] if link.media_end else 0)
            index = min(tokens, request.num_prompt_tokens) // self._block_size - 1
            if 0 <= index < len(hashes):
                _put(self._blocks, link.hash, hashes[index])

    def report(self) -> dict[str, Any]:
        """What is held now, for `PrefixRouter`: `links`, their hashes end to end; `media`, tokens
        by digest."""
        blocks, encoder_cache = self._scheduler.blocks, self._scheduler.encoder_cache
        links = [link for link, known in self._blocks.items() if blocks.find(known) is not None]
        media = {
            digest: known.num_tokens
            for digest, known in self._media.items()
            if all(key in encoder_cache for key in known.keys)
        }
        return {"links": b"".join(links), "media": media}


def links_in(report: bytes) -> frozenset[bytes]:
    """The hashes of a report."""
    return frozenset(report[at : at + HASH_BYTES] for at in range(0, len(report), HASH_BYTES))


def _items(request: Request) -> list[list[EncodeUnit]]:
    """The units of each image or video."""
    return [
        [unit for _, unit in group]
        for _, group in groupby(enumerate(request.units), key=lambda pair: pair[0] - pair[1].index)
    ]


def _media_tokens(request: Request) -> list[int]:
    """Tokens of the first n images and videos, for n from 1 on."""
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
