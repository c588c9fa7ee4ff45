"""Which video files are opened, and what of them: formats and codecs by allow-list."""

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
DECODERS = "h264,hevc,vp9,libdav1d,av1,mpeg4"  # that FFmpeg may try, to know what a stream is
BUFFER_BYTES = 1 << 18  # read at once: each read waits for the interpreter's lock
EDGES = 1 << 22  # pixels that decoders may put around a frame


def open_container(file: BinaryIO, field: str) -> Any:
    """The container, of a format named by its first bytes, so that nothing else is probed.

    A context manager; the file stays open. Raises `InputError`, and what PyAV raises.
    """
    form = format_of(file)
    if form is None:
        raise InputError(
            field, f"not a video that is read ({CONTAINERS}), nor an animated GIF or WebP"
        )
    options = {"codec_whitelist": DECODERS}
    if form == "mov":
        options["enable_drefs"] = "0"
    return av.open(
        file,
        format=form,
        container_options=options,
        buffer_size=BUFFER_BYTES,
        io_open=_open_nothing,
    )


def format_of(file: BinaryIO) -> str | None:
    """FFmpeg's name of the container; None: not one that is read."""
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    if head[4:] in BOXES:
        return "mov"
    return "matroska" if head[:4] == EBML else None


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """A video may name other files and URLs as parts of it: none are opened."""
    raise PermissionError


def video_stream(container: Any, limits: MediaLimits, field: str) -> Any:
    """The first stream of video, with no decoder open yet; all other streams are left out.

    Raises `InputError` where there is none, its codec is not one of those that are read, or its
    frames are too large.
    """
    streams = [each for each in container.streams.video if not _is_cover(each)]
    if not streams:
        raise InputError(field, "the file has no video")
    stream = streams[0]
    context = stream.codec_context
    if context is None or context.codec.canonical_name not in CODECS:
        names = ", ".join(CODECS.values())
        raise InputError(field, f"its video is of a codec that is not read ({names} are)")
    limits.check_size(stream.width, stream.height, field)
    # Frames may grow on the way. Decoders count the edges that they put around a frame.
    context.options = {"max_pixels": str(2 * limits.max_media_pixels + EDGES)}
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    return stream


def _is_cover(stream: Any) -> bool:
    """Pictures that go with a file are streams of their own."""
    return bool(stream.disposition & Disposition.attached_pic)
