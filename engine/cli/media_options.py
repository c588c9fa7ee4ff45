"""Options of commands that are about images and videos, with the help that each shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

AllowMediaDomains = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-media-domains",
        metavar="HOST",
        help="A host whose http(s) URLs are fetched: example.com, *.example.com for all below it, "
        "or '*' for all. May be repeated. Addresses that are not public are refused in any case. "
        "Default: nothing is fetched.",
    ),
]
AllowMediaPath = Annotated[
    list[Path] | None,
    typer.Option(
        "--allow-media-path",
        metavar="FOLDER",
        help="A folder whose files requests may name as file:///..., links followed. May be "
        "repeated. Default: no file of this machine is read.",
    ),
]
ImageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--image-option",
        metavar="NAME=VALUE",
        help="For each image that does not say otherwise: min_pixels, max_pixels, resized_height, "
        "resized_width. May be repeated.",
    ),
]
VideoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--video-option",
        metavar="NAME=VALUE",
        help="The same for each video; also fps, nframes, min_frames, max_frames, total_pixels, "
        "video_start, video_end. May be repeated.",
    ),
]

# The limits: what is over one is refused with INVALID_ARGUMENT, which names it.
MaxMediaBytes = Annotated[
    int, typer.Option(help="Limit of media: bytes of a file (a gRPC message takes 256 MiB).")
]
MaxMediaPixels = Annotated[
    int, typer.Option(help="Limit of media: pixels of an image or a frame, decoded.")
]
MaxVideoFrames = Annotated[
    int, typer.Option(help="Limit of media: frames that are taken of a video.")
]
MaxVideoSeconds = Annotated[int, typer.Option(help="Limit of media: seconds that a video lasts.")]
MaxMediaItems = Annotated[
    int, typer.Option(help="Limit of media: images and videos of one request.")
]
FetchTimeout = Annotated[
    int, typer.Option("--fetch-timeout-s", help="Limit of media: seconds to fetch a URL.")
]
MediaTimeout = Annotated[
    int, typer.Option("--media-timeout-s", help="Limit of media: seconds to make an item ready.")
]
DecoderMemory = Annotated[
    int,
    typer.Option(
        "--decoder-memory-bytes",
        help="Limit of media: address space of a process that decodes files; all of them together "
        "stay within half of the available memory. A request whose file needs more is rejected.",
    ),
]


def read_options(given: Sequence[str] | None, flag: str) -> dict[str, float]:
    """NAME=VALUE, each once. Raises ValueError, which names the flag."""
    found: dict[str, float] = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} {each}: must be NAME=VALUE, such as max_pixels=200704")
        if name in found:
            raise ValueError(f"{flag} {each}: {name} is given twice")
        try:
            found[name] = int(value) if value.lstrip("+-").isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"{flag} {each}: {value!r} is no number") from None
    return found


def hosts_of(sources: Sequence[str]) -> tuple[str, ...]:
    """Hosts of the URLs among them: who typed a URL wants it fetched."""
    urls = [source for source in sources if source[:8].lower().startswith(("http://", "https://"))]
    return tuple(dict.fromkeys(filter(None, (urlsplit(url).hostname for url in urls))))
