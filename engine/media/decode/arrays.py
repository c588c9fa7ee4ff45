"""Read images and videos given as numpy arrays or torch tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...config.media_limits import MediaLimits
from ...errors import InputError
from .image import resize
from .reader import Frame, MediaHeader
from .resample import resize_frame
from .rgb import to_rgb

LAYOUTS = {"image": "height × width × channels", "video": "frames × height × width × channels"}
CHANNELS = (3, 4)  # RGB and RGBA; RGBA is flattened onto white


def is_array(source: Any) -> bool:
    """Return whether a source is an array of any library, without importing torch."""
    return hasattr(source, "__array__") and not isinstance(source, Image.Image)


class ArrayFile:
    """`MediaReader` of a uint8 array.

    An image or a single frame has the shape [height, width, channels], a video [frames, height,
    width, channels]. Pixels are not copied until a frame is resized.
    """

    def __init__(
        self, source: Any, kind: str, limits: MediaLimits, field: str, fps: float = 1.0
    ) -> None:
        """Wrap an array. Raises `InputError` if its dtype, shape or size is invalid."""
        array = _as_uint8(source, field)
        _check_shape(array.shape, "video" if kind == "video" else "image", field)
        self._frames = array if kind == "video" else array[None]
        self._is_video = kind != "image"
        count, height, width, _ = self._frames.shape
        limits.check_frames(count, field)
        limits.check_size(width, height, field)
        self.header = MediaHeader(height, width, count, fps)

    def times(self, indices: Sequence[int]) -> list[float]:
        return [index / self.header.fps for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        for index in indices:
            image = to_rgb(Image.fromarray(self._frames[index]))
            if self._is_video:
                yield Frame(index, resize_frame(np.asarray(image), height, width))
            else:
                yield Frame(index, resize(image, height, width))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _as_uint8(source: Any, field: str) -> npt.NDArray[np.uint8]:
    dtype = str(getattr(source, "dtype", type(source).__name__)).removeprefix("torch.")
    if dtype != "uint8":
        raise InputError(
            field,
            f"an array of {dtype}: must be uint8, 0 to 255 (multiply floats of 0 to 1 by 255)",
        )
    try:  # a tensor may be on a GPU
        return np.asarray(source.cpu() if hasattr(source, "cpu") else source)
    except Exception:
        raise InputError(field, f"{type(source).__name__}: cannot be read as an array") from None


def _check_shape(shape: tuple[int, ...], kind: str, field: str) -> None:
    found = "×".join(map(str, shape)) or "0 axes"
    if len(shape) == len(LAYOUTS[kind].split("×")) and shape[-1] in CHANNELS:
        if shape[0] < 1 and kind == "video":
            raise InputError(field, "0 frames; pass at least one")
        return
    hint = ""
    if len(shape) >= 3 and shape[-3] in CHANNELS:
        hint = "; if it is CHW, move the channels last"
    elif len(shape) == 4 and kind == "image":
        hint = "; pass the images of a batch one by one, or a video as a video"
    elif len(shape) == 2 or shape[-1:] == (1,):
        hint = "; pass gray as three equal channels"
    raise InputError(
        field, f"an array of {found}: must be {LAYOUTS[kind]}, with 3 (RGB) or 4 channels{hint}"
    )
