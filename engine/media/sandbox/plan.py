"""How many decoder processes there are, and how much memory each may use.

All of them together stay within a share of the machine's memory. Most images need a fraction of
`decoder_memory_bytes`, so each process normally has `SMALL_BYTES`; only some at a time may use all
of it, for large images and videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...config.media_limits import MediaLimits
from ..decode.reader import MediaHeader

MEMORY_SHARE = 0.5  # of the memory that is available at the start
SMALL_BYTES = 1 << 30  # of address space, of which 220 MB are the process itself
MIN_BYTES = 512 << 20  # of address space, whatever the machine has
# What fits into SMALL_BYTES. Images take up to 22 bytes a pixel (float TIFF, lossless WebP);
# video decoders hold up to 40 frames, by their threads and references.
SMALL_IMAGE_PIXELS = 16 << 20
SMALL_FRAME_PIXELS = 2048 * 1152
SMALL_FILE_BYTES = 64 << 20  # WebP and TIFF files may be held in memory
MEDIA_LANES = ("images", "videos", "urls")


@dataclass(frozen=True)
class DecoderPlan:
    """At most `num_decoders` processes of `small_bytes`; at most `num_large` of them at a time may
    use `large_bytes` instead. `lanes`: how many each lane may use."""

    num_decoders: int
    num_large: int
    small_bytes: int
    large_bytes: int
    lanes: Mapping[str, int]
    are_shared: bool = False  # there are fewer decoders than lanes: all lanes queue for the same

    @property
    def total_bytes(self) -> int:
        """The most address space of all processes."""
        extra = self.large_bytes - self.small_bytes
        return self.num_decoders * self.small_bytes + self.num_large * extra

    def __str__(self) -> str:
        return (
            f"up to {self.num_decoders} processes, {self.num_large} of them with "
            f"{self.large_bytes / 1e9:.1f} GB and the others with {self.small_bytes / 1e9:.1f} GB "
            f"at a time: {self.total_bytes / 1e9:.1f} GB in total"
        )


def plan_decoders(
    wanted: Mapping[str, int], limits: MediaLimits, available_bytes: int
) -> DecoderPlan:
    """Half of the budget is for many small processes, the rest for large ones.

    `wanted`: decoders of each lane, by the number of cores. On a machine with little memory the
    largest process gets less than `decoder_memory_bytes`.
    """
    budget = max(int(available_bytes * MEMORY_SHARE), MIN_BYTES)
    large = min(limits.decoder_memory_bytes, _most_of_one(budget, len(wanted)))
    small = min(SMALL_BYTES, large)
    extra = large - small
    for_large = max(budget // 2, 2 * extra)  # an image and a video
    for_large = min(for_large, max(extra, budget - len(wanted) * small))
    count = min(sum(wanted.values()), max(1, (budget - for_large) // small))
    num_large = min(count, (budget - count * small) // extra) if extra else count
    lanes = _divide(count, wanted)
    return DecoderPlan(count, num_large, small, large, lanes, count < len(wanted))


def _most_of_one(budget: int, num_lanes: int) -> int:
    """Leave a small process for each other lane, unless too little remains for a large file."""
    rest = budget - (num_lanes - 1) * SMALL_BYTES
    return rest if rest >= 2 * SMALL_BYTES else budget


def _divide(count: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """One decoder for each lane, and the rest in proportion to what the lanes want."""
    if count < len(wanted):
        return dict.fromkeys(wanted, count)
    lanes = dict.fromkeys(wanted, 1)
    for _ in range(count - len(wanted)):
        lanes[min(lanes, key=lambda lane: lanes[lane] / wanted[lane])] += 1
    return lanes


def is_small(kind: str, header: MediaHeader, num_bytes: int) -> bool:
    """Whether `SMALL_BYTES` are enough to decode a file of `num_bytes`."""
    pixels = header.height * header.width
    if kind == "video":
        return pixels <= SMALL_FRAME_PIXELS
    return pixels <= SMALL_IMAGE_PIXELS and num_bytes <= SMALL_FILE_BYTES
