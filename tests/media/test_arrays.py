"""Images and videos that are arrays: numpy's, torch's, anyone's."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.benchmarks.media.cases import load, noise
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.decode.arrays import ArrayFile
from octavo.engine.media.options import MediaOptions


class Foreign:
    """An array of a library that nobody has heard of."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.dtype = array, array.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array


def stills(count: int) -> list[Image.Image]:
    return [noise(60, 44, seed=i) for i in range(count)]


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, Foreign])
def test_an_array_is_the_picture_that_it_holds(make: Any) -> None:
    image = noise(60, 44)
    expected, pixels = load("image", image)
    item, found = load("image", make(np.array(image)))
    assert item.info == expected.info
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, Foreign])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_an_array_of_frames_is_a_list_of_them(make: Any, count: int) -> None:
    options = MediaOptions(fps=4.0)
    expected, pixels = load("video", stills(count), options)
    item, found = load("video", make(np.stack(stills(count))), options)
    assert item.info == expected.info and item.info.sample_fps == 4.0
    np.testing.assert_array_equal(found, pixels)


def test_arrays_may_be_frames_of_a_list() -> None:
    images = stills(4)
    mixed = [np.asarray(images[0]), torch.tensor(np.array(images[1])), *images[2:]]
    np.testing.assert_array_equal(load("video", mixed)[1], load("video", images)[1])


def test_views_are_read_as_they_are_seen() -> None:
    whole = np.asarray(noise(120, 88))
    for view in (whole[::2, ::-2], whole[..., ::-1], whole.transpose(1, 0, 2)):
        expected = load("image", Image.fromarray(np.ascontiguousarray(view)))[1]
        np.testing.assert_array_equal(load("image", view)[1], expected)
    planes = torch.tensor(whole.transpose(2, 0, 1).copy())  # CHW, seen as HWC
    expected = load("image", Image.fromarray(whole))[1]
    np.testing.assert_array_equal(load("image", planes.permute(1, 2, 0))[1], expected)


def test_a_fourth_channel_is_flattened_onto_white() -> None:
    clear = np.zeros((2, 30, 40, 4), np.uint8)
    assert load("image", clear[0])[1].min() == 255
    assert load("video", clear)[1].min() == 255
    clear[..., 3] = 255
    assert load("video", clear)[1].max() == 0


def test_an_array_is_not_copied_when_it_is_opened() -> None:
    array = np.zeros((4, 30, 40, 3), np.uint8)
    reader = ArrayFile(torch.from_numpy(array), "video", MediaLimits(), "video", 2.0)
    array[2] = 200  # seen, since nothing was copied
    (frame,) = reader.frames([2], 30, 40)
    assert frame.pixels.min() == 200 and reader.times([2]) == [1.0]


HWC = np.zeros((30, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("image", HWC.astype(np.float32), "float32: must be uint8.* by 255"),
        ("image", HWC.astype(np.int64), "int64: must be uint8"),
        ("image", HWC.astype(bool), "bool: must be uint8"),
        ("image", torch.zeros(30, 40, 3, dtype=torch.bfloat16), "of bfloat16: must be uint8"),
        ("image", torch.zeros(30, 40, 3, dtype=torch.uint8, device="meta"), "cannot be read"),
        ("image", np.array([[None]]), "object: must be uint8"),
        ("image", np.uint8(5), "0 axes: must be height × width × channels"),
        ("image", HWC.transpose(2, 0, 1), "3×30×40: .*if it is CHW"),
        ("image", HWC[..., 0], "30×40: .*gray as three"),
        ("image", HWC[..., :1], "30×40×1: .*gray as three"),
        ("image", HWC[..., :2], "30×40×2: must be"),
        ("image", HWC[None], "1×30×40×3: .*one by one"),
        ("image", HWC[:0], "no size"),
        ("video", HWC, "30×40×3: must be frames × height"),
        ("video", HWC.transpose(2, 0, 1)[None], "1×3×30×40: .*if it is CHW"),
        ("video", HWC[None][:0], "0 frames"),
        ("video", HWC[None, :, :0], "no size"),
        ("video", np.zeros((2049, 1, 1, 3), np.uint8), "--max-video-frames"),
        ("image", np.broadcast_to(np.uint8(0), (11_000, 11_000, 3)), "--max-media-pixels"),
    ],
)
def test_other_arrays_are_rejected_clearly(kind: str, source: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        load(kind, source)
    assert refused.value.field == kind


def test_frames_of_an_array_are_taken_as_they_are() -> None:
    for options in (MediaOptions(nframes=2), MediaOptions(video_end=1.0)):
        with pytest.raises(InputError, match="all frames of a list are used"):
            load("video", np.stack(stills(4)), options)


def test_torch_is_not_imported_for_arrays() -> None:
    code = "import sys; import octavo.engine.media.decode.arrays; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
