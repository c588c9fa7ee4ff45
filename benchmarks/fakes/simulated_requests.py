"""Random requests for scheduler simulations.

They share prefixes and have images, forks, and videos whose later frames are not decoded yet.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo.scheduler.request import Request

from .simulated_worker import Span, make_request

PLACEHOLDER = 49
IMAGES = [(bytes([i]) * 32, 1 + 3 * i) for i in range(5)]  # media_hash, tokens


@dataclass(frozen=True, eq=False)
class Unmade:
    """Requests with a common prompt, some of whose later units are not decoded yet."""

    requests: Sequence[Request]
    media_hashes: list[bytes]  # of the missing units
    rng: random.Random

    def __bool__(self) -> bool:
        return bool(self.media_hashes)


def withhold(requests: Sequence[Request], media_hashes: list[bytes], rng: random.Random) -> Unmade:
    """Remove the media hashes of later units, as before they are decoded."""
    count = rng.randint(0, len(media_hashes))
    for request in requests:
        later = (replace(unit, media_hash=b"") for unit in request.units[count:])
        request.units = (*request.units[:count], *later)
        request.supply([])
    return Unmade(requests, media_hashes[count:], rng)


def draw_requests(name: str, rng: random.Random, now: float) -> tuple[list[Request], list[bytes]]:
    """Return a random request with its forks, and the media hashes of their units.

    Prompts are sampled from a small tree, so that many share a prefix.
    """
    prompt: list[int] = []
    spans: list[Span] = []
    depth = rng.randint(1, 8)
    branch = 0
    for level in range(depth):
        branch = branch * 2 + (rng.random() < 0.25)
        part = random.Random(level * 1000 + branch)
        if part.random() < 0.35:
            media_hash, count = part.choice(IMAGES)
            looks = rng.choice([media_hash, media_hash, media_hash[::-1][1:] + b"."])
            frames = part.choice([1, 1, 2, 3])
            spans.append((len(prompt), count * frames, looks, frames))  # sometimes different pixels
            prompt += [PLACEHOLDER] * (count * frames)
        else:
            prompt += [part.randrange(PLACEHOLDER) for _ in range(part.randint(1, 9))]
    timeout = rng.choice([math.inf] * 5 + [rng.random() * 2])
    common: dict[str, Any] = {
        "max_tokens": rng.randint(1, 14),
        "cache_salt": rng.choice([b"", b"", b"other"]),
        "priority": rng.choice([5, 5, 0, 9, rng.randrange(10)]),
        "deadline": now + timeout,
        "stop_token_ids": frozenset(rng.sample(range(PLACEHOLDER), 2)),
        "is_guided": zlib.crc32(name.encode()) % 4 == 0,  # guided: waits for each token
    }
    num_forks = rng.choice([0, 0, 0, 0, 1, 3])
    names = [name, *(f"{name}[{i}]" for i in range(1, num_forks + 1))]
    requests = [
        make_request(each, prompt, *spans, seed=rng.choice([i, 0]), **common)
        for i, each in enumerate(names)
    ]
    hashes = [hashed for _, _, hashed, *frames in spans for _ in range(int(frames[0]))]
    return requests, hashes
