"""Open video files; containers and codecs are restricted by allow-lists."""

from __future__ import annotations

from typing import Any, BinaryIO, NoReturn

import av
from av.stream import Discard, Disposition

from ...config.media_limits import MediaLimits
from ...errors import InputError

CONTAINERS = "MP4, MOV, MKV, WebM"
CODECS = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1", "mpeg4": "MPEG-4"}
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"styp", b"moof")
EBML = b"\x1aE\xdf\xa3"
DECODERS = "h264,hevc,vp9,libdav1d,av1,mpeg4"  # that FFmpeg may use to probe streams
BUFFER_BYTES = 1 << 18  # per read; each read has to acquire the GIL
EDGES = 1 << 22  # pixels that decoders may add as padding around a frame


def open_container(file: BinaryIO, field: str) -> Any:
    """Open a container with the demuxer for its first bytes; FFmpeg probes no other format.

    Returns a context manager, which leaves the file open. Raises `InputError` if the format is not
    supported, and the errors of PyAV.
    """
    container_format = format_of(file)
    if container_format is None:
        raise InputError(
            field, f"not a supported video ({CONTAINERS}) or animated image (GIF, WebP)"
        )
    options = {"codec_whitelist": DECODERS}
    if container_format == "mov":
        options["enable_drefs"] = "0"
    return av.open(
        file,
        format=container_format,
        container_options=options,
        buffer_size=BUFFER_BYTES,
        io_open=_open_nothing,
    )


def format_of(file: BinaryIO) -> str | None:
    """Return FFmpeg's name of the container format; None if it is not supported."""
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    if head[4:] in BOXES:
        return "mov"
    return "matroska" if head[:4] == EBML else None


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """Block access to other files and URLs, which a video may reference as its parts."""
    raise PermissionError


def video_stream(container: Any, limits: MediaLimits, field: str) -> Any:
    """Return the first video stream, its decoder not yet open, and discard all other streams.

    Raises `InputError` if there is no video stream, its codec is not supported, or its frames are
    too large.
    """
    streams = [each for each in container.streams.video if not _is_cover(each)]
    if not streams:
        raise InputError(field, "the file has no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None or context.codec.canonical_name not in CODECS:
        names = ", ".join(CODECS.values())
        raise InputError(field, f"the video codec is not supported; convert it to one of {names}")
    limits.check_size(stream.width, stream.height, field)
    # The frame size may change within a stream, and decoders include the padding around a frame.
    context.options = {"max_pixels": str(2 * limits.max_media_pixels + EDGES)}
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    return stream


def _is_cover(stream: Any) -> bool:
    """Return whether a stream is an attached picture, such as cover art."""
    return bool(stream.disposition & Disposition.attached_pic)
