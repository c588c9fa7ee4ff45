"""Image and video parts in OpenAI's format: `image_url` and `video_url`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import InputError

LOW_DETAIL_PIXELS = 512 * 512  # max_pixels of detail "low"
DETAILS = (None, "auto", "low", "high")
URLS = ("image_url", "video_url")
KIND_OF = {"image_url": "image", "video_url": "video", "image": "image", "video": "video"}
PART_KEYS = ("text", "image", "video", "image_url", "video_url")
SIZES = ("max_pixels", "resized_height", "resized_width")


def with_type(part: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """Add the missing type to a part such as {"image": ...}, from its key.

    The model card and qwen-vl-utils also use this format. Raises `InputError` if the type is
    ambiguous or unknown.
    """
    if part.get("type") is not None:
        return part
    kinds = [name for name in PART_KEYS if part.get(name) is not None]
    if len(kinds) == 1:
        return {"type": kinds[0], **{k: v for k, v in part.items() if k != "type"}}
    found = f"it has {' and '.join(kinds)}" if kinds else "it has none of these"
    text = "missing; pass text, image, video, image_url or video_url, or one of these as the key"
    raise InputError(f"{field}.type", f"{text}: {found}")


def read_media(part: Mapping[str, Any], name: str, field: str) -> dict[str, Any]:
    """Convert a part to the model card's format, {"type": "image", "image": ..., options}.

    `part` has that format or OpenAI's, {"type": "image_url", "image_url": {"url": ..., options},
    options}.
    """
    kind, given = KIND_OF[name], part.get(name)
    inside = given if isinstance(given, Mapping) else {"url": given}
    options = {each: value for each, value in part.items() if each not in ("type", name)}
    for option, value in inside.items():
        if option in options:
            raise InputError(f"{field}.{option}", "is given twice; pass it next to the url only")
        if option != "url":
            options[option] = value
    for option in ("type", kind, "url"):
        if option in options:
            raise InputError(f"{field}.{option}", "is not an option; remove it")
    source = inside.get("url")
    if not _is_source(source, kind):
        more = ", or a list of them (the frames)" if kind == "video" else ""
        text = f"must be a URL or a data URI{more}"
        if name not in part or "url" not in inside:
            place, under = (inside, "'url'") if name in part else (part, f"the part's key {name!r}")
            keys = ", ".join(truncated_repr(key) for key in place if key != "type")
            text += f", under {under}; it has {keys or 'none'}"
        raise InputError(f"{field}.url", text)
    return {"type": kind, kind: source, **_read_detail(options, field)}


def _is_source(source: Any, kind: str) -> bool:
    """Return whether this is a source that JSON can express: a URL, data URI or list of them."""
    if kind == "video" and isinstance(source, list):
        return all(isinstance(frame, str) for frame in source)
    return isinstance(source, str)


def _read_detail(options: dict[str, Any], field: str) -> dict[str, Any]:
    """Convert OpenAI's `detail` to image size options."""
    detail = options.pop("detail", None)
    if not isinstance(detail, str | None) or detail not in DETAILS:
        raise InputError(f"{field}.detail", f"{truncated_repr(detail)}: must be auto, low or high")
    if detail == "low" and not any(options.get(name) for name in SIZES):
        options["max_pixels"] = LOW_DETAIL_PIXELS
    return options
