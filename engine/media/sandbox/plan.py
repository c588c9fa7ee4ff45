"""Plan the number of decoder processes and the memory limit of each.

Together they stay within a share of the machine's memory. Most images need a fraction of
`decoder_memory_bytes`, so a process normally has `SMALL_BYTES`; only a few at a time may use the
full amount, for large images and videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...config.media_limits import MediaLimits
from ..decode.reader import MediaHeader

MEMORY_SHARE = 0.5  # of the memory available at start
SMALL_BYTES = 1 << 30  # address space, of which the process itself takes 220 MB
MIN_BYTES = 512 << 20  # minimum budget of address space, on any machine
# Maximum sizes for SMALL_BYTES. Images take up to 22 bytes per pixel (float TIFF, lossless WebP);
# video decoders hold up to 40 frames, in their threads and as reference frames.
SMALL_IMAGE_PIXELS = 16 << 20
SMALL_FRAME_PIXELS = 2048 * 1152
SMALL_FILE_BYTES = 64 << 20  # WebP and TIFF files may be held in memory
MEDIA_LANES = ("images", "videos", "urls")


@dataclass(frozen=True)
class DecoderPlan:
    """Number of processes and their memory limits.

    There are at most `num_decoders` processes of `small_bytes`; at most `num_large` of them at a
    time may use `large_bytes` instead. `lanes` has the number of processes of each lane.
    """

    num_decoders: int
    num_large: int
    small_bytes: int
    large_bytes: int
    lanes: Mapping[str, int]
    are_shared: bool = False  # fewer decoders than lanes: all lanes share one queue

    @property
    def total_bytes(self) -> int:
        """Maximum address space of all processes together."""
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
    """Plan small processes in half of the memory budget and large ones in the rest.

    `wanted`: decoders of each lane, from the number of cores. On a machine with little memory, a
    large process gets less than `decoder_memory_bytes`.
    """
    budget = max(int(available_bytes * MEMORY_SHARE), MIN_BYTES)
    large = min(limits.decoder_memory_bytes, _most_of_one(budget, len(wanted)))
    small = min(SMALL_BYTES, large)
    extra = large - small
    for_large = max(budget // 2, 2 * extra)  # at least one large image and one large video
    for_large = min(for_large, max(extra, budget - len(wanted) * small))
    count = min(sum(wanted.values()), max(1, (budget - for_large) // small))
    num_large = min(count, (budget - count * small) // extra) if extra else count
    lanes = _divide(count, wanted)
    return DecoderPlan(count, num_large, small, large, lanes, count < len(wanted))


def _most_of_one(budget: int, num_lanes: int) -> int:
    """Reserve a small process for each other lane, unless too little remains for a large file."""
    rest = budget - (num_lanes - 1) * SMALL_BYTES
    return rest if rest >= 2 * SMALL_BYTES else budget


def _divide(count: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Give each lane one decoder, and distribute the rest in proportion to `wanted`."""
    if count < len(wanted):
        return dict.fromkeys(wanted, count)
    lanes = dict.fromkeys(wanted, 1)
    for _ in range(count - len(wanted)):
        lanes[min(lanes, key=lambda lane: lanes[lane] / wanted[lane])] += 1
    return lanes


def is_small(kind: str, header: MediaHeader, num_bytes: int) -> bool:
    """Return whether `SMALL_BYTES` are enough to decode a file of `num_bytes`."""
    pixels = header.height * header.width
    if kind == "video":
        return pixels <= SMALL_FRAME_PIXELS
    return pixels <= SMALL_IMAGE_PIXELS and num_bytes <= SMALL_FILE_BYTES
