"""What shapes an item: the options that may stand beside an image or a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import InputError

IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
NUMBERS = ("fps", "video_start", "video_end", "sample_fps", "raw_fps")  # that need not be whole
FROM_ZERO = ("video_start", "video_end")
MOST = 1 << 40
ORDERED = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end"))
# Where one of the first is given, the others have no say.
DECIDING = (
    (("resized_height", "resized_width"), ("min_pixels", "max_pixels", "total_pixels")),
    (("nframes",), ("fps", "min_frames", "max_frames")),
    (("sample_fps",), ("fps",)),
)
# What says which frames of a file are taken. (The fps of a list says what it is.)
# What is said of frames that were sampled already: a list, or an array.
OF_LISTS = ("sample_fps", "raw_fps")
OF_FILES = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")


@dataclass(frozen=True)
class MediaOptions:
    """Each with the meaning that qwen-vl-utils gives its name."""

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
    sample_fps: float | None = None  # of a list: how many of its frames make a second; as fps
    raw_fps: float | None = None  # of the video that a list was sampled from; for the echo alone

    @classmethod
    def from_part(cls, part: Mapping[str, Any], kind: str, field: str) -> MediaOptions:
        """The options written beside an image or a video. Raises `InputError`."""
        known = IMAGE_OPTIONS if kind == "image" else tuple(f.name for f in fields(cls))
        found: dict[str, Any] = {}
        for name, value in part.items():
            if name in ("type", kind) or value is None:
                continue
            if name not in known:
                text = f"{truncated_repr(name)} is no option; {kind}s have {', '.join(known)}"
                if "type" in part and kind not in part:  # a part's, not a server's defaults
                    text += f"; the {kind} itself goes under {kind!r}"
                raise InputError(field, text)
            found[name] = _number(value, name, f"{field}.{name}")
        options = cls(**found)
        options._check(field)
        return options

    @property
    def given(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def over(self, defaults: MediaOptions) -> MediaOptions:
        """An item's options, and of the server's those that do not contradict them."""
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
        """A server's defaults, as far as they are of use for frames that are all taken."""
        return replace(self, **dict.fromkeys(OF_FILES))

    def of_files(self) -> MediaOptions:
        """A server's defaults, as far as they are of use for files."""
        return replace(self, **dict.fromkeys(OF_LISTS))

    def check_size(self, factor: int, field: str) -> None:
        """Raise `InputError` for a limit below one token, which is `factor` pixels wide."""
        for name in ("max_pixels", "total_pixels"):
            value = getattr(self, name)
            if value is not None and value < factor**2:
                text = f"{value} is less than one token, which has {factor}×{factor} pixels"
                raise InputError(f"{field}.{name}", f"{text}; pass at least {factor**2}")

    def _check(self, field: str) -> None:
        if self.fps is not None and self.nframes is not None:
            raise InputError(f"{field}.fps", "give fps or nframes, not both")
        for name in ("min_frames", "max_frames"):
            if self.nframes is not None and getattr(self, name) is not None:
                raise InputError(f"{field}.{name}", "bounds what fps asks for: nframes is exact")
        if (self.resized_height is None) != (self.resized_width is None):
            raise InputError(f"{field}.resized_height", "goes with resized_width: give both")
        if None not in (self.fps, self.sample_fps) and self.fps != self.sample_fps:
            text = (
                f"{self.sample_fps}, and fps={self.fps}, which means the same for frames of a list"
            )
            raise InputError(f"{field}.sample_fps", f"{text}: give one of the two")
        for low, high in ORDERED:
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise InputError(f"{field}.{low}", f"{least} is over {high}={most}")
        if self.resized_height is not None and self.resized_width is not None:
            area = self.resized_height * self.resized_width
            self._check_between("resized_height", "pixels", area, field)
        if self.nframes is not None:
            self._check_between("nframes", "frames", self.nframes, field)

    def _check_between(self, name: str, what: str, value: int, field: str) -> None:
        """`name` comes to `value`, which must lie between min_`what` and max_`what`."""
        for limit, sign in ((f"min_{what}", 1), (f"max_{what}", -1)):
            bound = getattr(self, limit)
            if bound is not None and sign * bound > sign * value:
                text = f"comes to {value} {what}, and {limit}={bound}: give one of the two"
                raise InputError(f"{field}.{name}", text)


def _number(value: Any, name: str, field: str) -> float:
    kinds = (int, float) if name in NUMBERS else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        kind = "a number" if name in NUMBERS else "a whole number"
        raise InputError(field, f"{truncated_repr(value)}: must be {kind}")
    if not (0 < value <= MOST or (value == 0 and name in FROM_ZERO)):
        least = "at least 0" if name in FROM_ZERO else "over 0"
        raise InputError(field, f"{truncated_repr(value)}: must be {least} and at most {MOST}")
    return value
