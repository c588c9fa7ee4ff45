"""Preprocessing options of an image or a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import InputError

IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
NUMBERS = ("fps", "video_start", "video_end", "sample_fps", "raw_fps")  # may be fractional
FROM_ZERO = ("video_start", "video_end")  # may be 0
MAX_NUMBER = 1 << 40
ORDERED = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end"))
# An option of the first group disables all options of the second.
DECIDING = (
    (("resized_height", "resized_width"), ("min_pixels", "max_pixels", "total_pixels")),
    (("nframes",), ("fps", "min_frames", "max_frames")),
    (("sample_fps",), ("fps",)),
)
OF_LISTS = ("sample_fps", "raw_fps")  # describe frames sampled by the caller (a list or an array)
OF_FILES = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")  # sampling


@dataclass(frozen=True)
class MediaOptions:
    """Options of one item, with the names and meanings of qwen-vl-utils."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: int | None = None
    video_start: float | None = None  # seconds
    video_end: float | None = None
    sample_fps: float | None = None  # frames per second of a list; fps is an alias there
    raw_fps: float | None = None  # of the video a list was sampled from; only returned in MediaInfo

    @classmethod
    def from_part(cls, part: Mapping[str, Any], kind: str, field: str) -> MediaOptions:
        """Read the options in a message part or a dict of defaults.

        Raises `InputError` if an option is unknown, invalid or contradicts another.
        """
        known = IMAGE_OPTIONS if kind == "image" else tuple(f.name for f in fields(cls))
        found: dict[str, Any] = {}
        for name, value in part.items():
            if name in ("type", kind) or value is None:
                continue
            if name not in known:
                text = (
                    f"{truncated_repr(name)} is not an option; the options of {kind}s are "
                    f"{', '.join(known)}"
                )
                if "type" in part and kind not in part:  # a message part, not defaults
                    text += f"; the {kind} itself goes under {kind!r}"
                raise InputError(field, text)
            found[name] = _number(value, name, f"{field}.{name}")
        options = cls(**found)
        options._check(field)
        return options

    @property
    def given(self) -> dict[str, float]:
        """Options that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def over(self, defaults: MediaOptions) -> MediaOptions:
        """Return these options, completed by the `defaults` that do not contradict them."""
        own, others = self.given, defaults.given
        for pair in DECIDING:
            for one, other in (pair, pair[::-1]):
                if own.keys() & set(one):
                    others = {k: v for k, v in others.items() if k not in other}
        merged = others | own
        for low, high in ORDERED:
            if low in merged and high in merged and merged[low] > merged[high]:
                del merged[high if low in own else low]
        return MediaOptions(**merged)  # type: ignore[arg-type]

    def of_lists(self) -> MediaOptions:
        """Return the defaults that apply to lists of frames, all of which are used."""
        return replace(self, **dict.fromkeys(OF_FILES))

    def of_files(self) -> MediaOptions:
        """Return the defaults that apply to video files."""
        return replace(self, **dict.fromkeys(OF_LISTS))

    def check_size(self, factor: int, field: str) -> None:
        """Raise `InputError` if a limit is below one token, `factor` × `factor` pixels."""
        for name in ("max_pixels", "total_pixels"):
            value = getattr(self, name)
            if value is not None and value < factor**2:
                text = f"{value} is less than one token, which has {factor}×{factor} pixels"
                raise InputError(f"{field}.{name}", f"{text}; pass at least {factor**2}")

    def _check(self, field: str) -> None:
        if self.fps is not None and self.nframes is not None:
            raise InputError(f"{field}.fps", "cannot be combined with nframes; pass one of the two")
        for name in ("min_frames", "max_frames"):
            if self.nframes is not None and getattr(self, name) is not None:
                text = "applies only with fps, and nframes is exact; pass one of the two"
                raise InputError(f"{field}.{name}", text)
        if (self.resized_height is None) != (self.resized_width is None):
            raise InputError(f"{field}.resized_height", "requires resized_width; pass both")
        if None not in (self.fps, self.sample_fps) and self.fps != self.sample_fps:
            text = f"{self.sample_fps} differs from fps={self.fps}, its alias for lists of frames"
            raise InputError(f"{field}.sample_fps", f"{text}; pass one of the two")
        for low, high in ORDERED:
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                text = f"{least} is greater than {high}={most}; lower it or raise {high}"
                raise InputError(f"{field}.{low}", text)
        if self.resized_height is not None and self.resized_width is not None:
            area = self.resized_height * self.resized_width
            self._check_between("resized_height", "pixels", area, field)
        if self.nframes is not None:
            self._check_between("nframes", "frames", self.nframes, field)

    def _check_between(self, name: str, what: str, value: int, field: str) -> None:
        """Check that the `value` of option `name` is between min_`what` and max_`what`."""
        for limit, sign in ((f"min_{what}", 1), (f"max_{what}", -1)):
            bound = getattr(self, limit)
            if bound is not None and sign * bound > sign * value:
                text = f"{value} {what} contradict {limit}={bound}; pass one of the two"
                raise InputError(f"{field}.{name}", text)


def _number(value: Any, name: str, field: str) -> float:
    kinds = (int, float) if name in NUMBERS else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        kind = "a number" if name in NUMBERS else "an integer"
        raise InputError(field, f"{truncated_repr(value)}: must be {kind}")
    if not (0 < value <= MAX_NUMBER or (value == 0 and name in FROM_ZERO)):
        least = "at least 0" if name in FROM_ZERO else "greater than 0"
        text = f"must be {least} and at most {MAX_NUMBER}"
        raise InputError(field, f"{truncated_repr(value)}: {text}")
    return value
