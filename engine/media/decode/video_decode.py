"""Decode the selected frames of a video, and other frames only where those depend on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import dropwhile, islice
from typing import Any, BinaryIO

from av.error import InvalidDataError

from ...config.media_limits import MediaLimits
from .video_index import Run, VideoIndex
from .video_open import open_container, video_stream


class LostPlaceError(Exception):
    """The file does not match its index, or frames of a group are missing."""


def chosen_frames(
    file: BinaryIO, index: VideoIndex, indices: Sequence[int], limits: MediaLimits, field: str
) -> Iterator[tuple[int, Any]]:
    """Yield (index, av.VideoFrame) for the ascending `indices`; a corrupt file may lack some.

    Raises `InputError` and the errors of PyAV.
    """
    left = list(indices)
    if index.is_exact:
        try:
            for number, frame in _by_groups(file, index, index.runs(indices), limits, field):
                yield number, frame
                left.remove(number)
        except LostPlaceError:
            pass
    if left:
        yield from _straight_through(file, index, left, limits, field)


def _by_groups(
    file: BinaryIO, index: VideoIndex, runs: Sequence[Run], limits: MediaLimits, field: str
) -> Iterator[tuple[int, Any]]:
    """Yield the wanted frames of all runs. Raises `LostPlaceError`."""
    with open_container(file, field) as container:
        stream = video_stream(container, limits, field)
        context = stream.codec_context
        context.thread_type = "AUTO"
        for numbers, packets in _passes(container, stream, index, runs):
            wanted = list(numbers)
            for frame in frames_of(context, packets):
                number = index.frame_of(frame.pts)
                if number is None or number < wanted[0]:
                    continue
                if number != wanted.pop(0):
                    raise LostPlaceError
                yield number, frame
                if not wanted:
                    break
            if wanted:
                raise LostPlaceError


def _passes(
    container: Any, stream: Any, index: VideoIndex, runs: Sequence[Run]
) -> Iterator[tuple[Sequence[int], Iterator[Any]]]:
    """Yield (wanted frames, packets to decode) for each pass between two flushes of the decoder."""
    context = stream.codec_context
    # FFmpeg's VP9 decoder crashes on a corrupt keyframe after a flush, so it gets a single pass.
    if context.name == "vp9":
        yield [number for run in runs for number in run.wanted], _read_past(container, stream, runs)
        return
    for run in runs:
        if run.start:
            container.seek(int(index.pts[run.start]), stream=stream)  # flushes the decoder
        rest = _packets_from(container, stream, index, run.start)
        packets: Iterator[Any] = islice(rest, run.size)
        if context.name == "h264":
            pts_wanted = {int(index.shown[number]) for number in run.wanted}
            packets = _skip_unreferenced(context, packets, pts_wanted)
        yield run.wanted, packets


def _read_past(container: Any, stream: Any, runs: Sequence[Run]) -> Iterator[Any]:
    """Yield the packets of all runs; read and drop those between."""
    packets, at = packets_of(container, stream), 0
    for run in runs:
        yield from islice(packets, run.start - at, run.stop - at)
        at = run.stop


def _packets_from(container: Any, stream: Any, index: VideoIndex, start: int) -> Iterator[Any]:
    """Yield the packets from index `start` on, after a seek to it or to an earlier packet."""
    packets = packets_of(container, stream)
    packet = next(packets, None)
    position = index.packet_of(packet.pts) if start and packet is not None else 0
    if position is None or position > start:
        raise LostPlaceError
    for _ in range(position, start):
        packet = next(packets, None)
    if packet is None or packet.pts != index.pts[start]:
        raise LostPlaceError
    yield packet
    yield from packets


def _skip_unreferenced(context: Any, packets: Iterator[Any], wanted: set[int]) -> Iterator[Any]:
    """Yield the packets; the decoder skips non-reference frames whose pts is not in `wanted`.

    Only for H.264: in HEVC, a frame of a higher temporal layer may still depend on such a frame.
    """
    for packet in packets:
        context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield packet
    context.skip_frame = "DEFAULT"


def _straight_through(
    file: BinaryIO, index: VideoIndex, indices: Sequence[int], limits: MediaLimits, field: str
) -> Iterator[tuple[int, Any]]:
    """Yield the same frames as `_by_groups`, by decoding the file from its first keyframe."""
    with open_container(file, field) as container:
        stream = video_stream(container, limits, field)
        stream.codec_context.thread_type = "AUTO"
        wanted = iter(indices)
        expected = next(wanted, None)
        packets = dropwhile(lambda packet: not packet.is_keyframe, packets_of(container, stream))
        frames = frames_of(stream.codec_context, packets)
        for count, frame in enumerate(frames):
            number = index.frame_of(frame.pts) if index.is_exact else count
            while number is not None and expected is not None and expected < number:
                expected = next(wanted, None)
            if expected is None:
                return
            if number == expected:
                yield number, frame
                expected = next(wanted, None)


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the stream's packets except empty ones, which would flush the decoder."""
    return (packet for packet in container.demux(stream) if packet.size)


def frames_of(context: Any, packets: Iterator[Any]) -> Iterator[Any]:
    """Decode the packets and yield their frames."""
    for packet in packets:
        yield from _decoded(context, packet)
    yield from _decoded(context, None)


def _decoded(context: Any, packet: Any) -> Sequence[Any]:
    """Return the frames that the decoder outputs for a packet (None: flush the remaining ones)."""
    try:
        return context.decode(packet)
    except InvalidDataError:  # a corrupt packet loses only its own frame
        return ()
