"""Media options of commands, with their help texts."""

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
        help="A host to fetch http(s) URLs from: example.com, *.example.com for all subdomains, or "
        "'*' for all hosts. May be repeated. Non-public addresses are always rejected. "
        "Default: no URLs are fetched.",
    ),
]
AllowMediaPath = Annotated[
    list[Path] | None,
    typer.Option(
        "--allow-media-path",
        metavar="FOLDER",
        help="A folder whose files requests may read with file:///... URLs; symbolic links are "
        "resolved first. May be repeated. Default: no local files are read.",
    ),
]
ImageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--image-option",
        metavar="NAME=VALUE",
        help="Default option of images: min_pixels, max_pixels, resized_height or resized_width. "
        "May be repeated.",
    ),
]
VideoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--video-option",
        metavar="NAME=VALUE",
        help="Default option of videos: as for images, and fps, nframes, min_frames, max_frames, "
        "total_pixels, video_start or video_end. May be repeated.",
    ),
]

# Limits. Exceeding one gives INVALID_ARGUMENT with a text that names it.
MaxMediaBytes = Annotated[
    int, typer.Option(help="Media limit: bytes of a file (gRPC messages may have 256 MiB).")
]
MaxMediaPixels = Annotated[
    int, typer.Option(help="Media limit: pixels of a decoded image or frame.")
]
MaxVideoFrames = Annotated[int, typer.Option(help="Media limit: frames sampled from a video.")]
MaxVideoSeconds = Annotated[int, typer.Option(help="Media limit: duration of a video in seconds.")]
MaxMediaItems = Annotated[int, typer.Option(help="Media limit: images and videos per request.")]
FetchTimeout = Annotated[
    int, typer.Option("--fetch-timeout-s", help="Media limit: seconds to fetch a URL.")
]
MediaTimeout = Annotated[
    int, typer.Option("--media-timeout-s", help="Media limit: seconds to preprocess an item.")
]
DecoderMemory = Annotated[
    int,
    typer.Option(
        "--decoder-memory-bytes",
        help="Media limit: address space in bytes of a decoder process. All decoder processes "
        "together use at most half of the available memory. Files that need more are rejected.",
    ),
]


def read_options(given: Sequence[str] | None, flag: str) -> dict[str, float]:
    """Parse NAME=VALUE options. Raises ValueError, which names the flag."""
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
            raise ValueError(f"{flag} {each}: {value!r} is not a number") from None
    return found


def hosts_of(sources: Sequence[str]) -> tuple[str, ...]:
    """Return the hosts of all URLs in `sources`. A URL on the command line may be fetched."""
    urls = [source for source in sources if source[:8].lower().startswith(("http://", "https://"))]
    return tuple(dict.fromkeys(filter(None, (urlsplit(url).hostname for url in urls))))
