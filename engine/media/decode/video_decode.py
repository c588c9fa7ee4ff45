"""Decodes the frames that were chosen, and of all others only what those need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import dropwhile, islice
from typing import Any, BinaryIO

from av.error import InvalidDataError

from ...config.media_limits import MediaLimits
from .video_index import Run, VideoIndex
from .video_open import open_container, video_stream


class LostPlaceError(Exception):
    """The file does not go on where its index says, or frames of a group did not come."""


def chosen_frames(
    file: BinaryIO, index: VideoIndex, indices: Sequence[int], limits: MediaLimits, field: str
) -> Iterator[tuple[int, Any]]:
    """Each of `indices`, which rise, with its av.VideoFrame; of a broken file some are lacking.

    Raises `InputError`, and what PyAV raises.
    """
    left = list(indices)
    if index.is_exact:
        try:
            for place, frame in _by_groups(file, index, index.runs(indices), limits, field):
                yield place, frame
                left.remove(place)
        except LostPlaceError:
            pass
    if left:
        yield from _straight_through(file, index, left, limits, field)


def _by_groups(
    file: BinaryIO, index: VideoIndex, runs: Sequence[Run], limits: MediaLimits, field: str
) -> Iterator[tuple[int, Any]]:
    """The frames of all runs. Raises `LostPlaceError`."""
    with open_container(file, field) as container:
        stream = video_stream(container, limits, field)
        context = stream.codec_context
        context.thread_type = "AUTO"
        for places, packets in _passes(container, stream, index, runs):
            wanted = list(places)
            for frame in frames_of(context, packets):
                place = index.frame_of(frame.pts)
                if place is None or place < wanted[0]:
                    continue
                if place != wanted.pop(0):
                    raise LostPlaceError
                yield place, frame
                if not wanted:
                    break
            if wanted:
                raise LostPlaceError


def _passes(
    container: Any, stream: Any, index: VideoIndex, runs: Sequence[Run]
) -> Iterator[tuple[Sequence[int], Iterator[Any]]]:
    """What goes through the decoder between two times that it is emptied, and the frames wanted."""
    context = stream.codec_context
    if context.name == "vp9":  # FFmpeg's crashes if it was emptied and the next keyframe is broken
        yield [place for run in runs for place in run.wanted], _read_past(container, stream, runs)
        return
    for run in runs:
        if run.start:
            container.seek(int(index.pts[run.start]), stream=stream)  # empties the decoder
        rest = _packets_from(container, stream, index, run.start)
        packets: Iterator[Any] = islice(rest, run.size)
        if context.name == "h264":
            packets = _sparing(context, packets, {int(index.shown[place]) for place in run.wanted})
        yield run.wanted, packets


def _read_past(container: Any, stream: Any, runs: Sequence[Run]) -> Iterator[Any]:
    """The packets of all runs; those between are read and left out."""
    packets, at = packets_of(container, stream), 0
    for run in runs:
        yield from islice(packets, run.start - at, run.stop - at)
        at = run.stop


def _packets_from(container: Any, stream: Any, index: VideoIndex, start: int) -> Iterator[Any]:
    """The packets from place `start` on, which a seek came to or before."""
    packets = packets_of(container, stream)
    packet = next(packets, None)
    place = index.packet_of(packet.pts) if start and packet is not None else 0
    if place is None or place > start:
        raise LostPlaceError
    for _ in range(place, start):
        packet = next(packets, None)
    if packet is None or packet.pts != index.pts[start]:
        raise LostPlaceError
    yield packet
    yield from packets


def _sparing(context: Any, packets: Iterator[Any], wanted: set[int]) -> Iterator[Any]:
    """The packets; those of frames that nobody wants and no other frame needs are left undecoded.

    In H.264 alone it is sure that no other frame needs them: HEVC's may serve a higher layer.
    """
    for packet in packets:
        context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield packet
    context.skip_frame = "DEFAULT"


def _straight_through(
    file: BinaryIO, index: VideoIndex, indices: Sequence[int], limits: MediaLimits, field: str
) -> Iterator[tuple[int, Any]]:
    """The same frames, where the whole file must be decoded for them."""
    with open_container(file, field) as container:
        stream = video_stream(container, limits, field)
        stream.codec_context.thread_type = "AUTO"
        wanted = iter(indices)
        expected = next(wanted, None)
        packets = dropwhile(lambda packet: not packet.is_keyframe, packets_of(container, stream))
        frames = frames_of(stream.codec_context, packets)
        for count, frame in enumerate(frames):
            place = index.frame_of(frame.pts) if index.is_exact else count
            while place is not None and expected is not None and expected < place:
                expected = next(wanted, None)
            if expected is None:
                return
            if place == expected:
                yield place, frame
                expected = next(wanted, None)


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """Those that are not empty: an empty one tells a decoder that no more come."""
    return (packet for packet in container.demux(stream) if packet.size)


def frames_of(context: Any, packets: Iterator[Any]) -> Iterator[Any]:
    """All frames of those packets."""
    for packet in packets:
        yield from _decoded(context, packet)
    yield from _decoded(context, None)


def _decoded(context: Any, packet: Any) -> Sequence[Any]:
    """The frames that come out when a packet goes in (None: all that are left)."""
    try:
        return context.decode(packet)
    except InvalidDataError:  # one broken packet of many: its frame is lacking, others come
        return ()
