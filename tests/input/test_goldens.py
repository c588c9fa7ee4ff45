"""Sizes, frames, pixels and positions against what qwen-vl-utils and transformers made.

`tests/data` has their recorded results: qwen-vl-utils 0.0.14, transformers 5.19 with PIL.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.benchmarks.media.cases import load
from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.input.mrope import mrope_positions
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.sizes import frame_indices, image_size, smart_nframes, smart_resize
from octavo.kernels.patches import cut_patches
from octavo.scheduler.request import MediaSpan

DATA = Path(__file__).parents[1] / "data"
DEFAULTS = PreprocessConfig()


def recorded(name: str) -> list[dict[str, Any]]:
    return json.loads((DATA / f"{name}.json").read_text())


@pytest.mark.lesson("L10")
@pytest.mark.parametrize("case", recorded("smart_resize"), ids=str)
def test_extreme_images_smart_resize(case: dict[str, Any]) -> None:
    low = case["min_pixels"] or DEFAULTS.min_pixels
    high = case["max_pixels"] or DEFAULTS.max_pixels
    args = (case["height"], case["width"], 28, low, high, "image")
    if case["resized"] == "error" or 0 in case["resized"]:  # the reference gives images of no size
        with pytest.raises(InputError, match=r"200 times|less than one token"):
            smart_resize(*args)
    else:
        assert list(smart_resize(*args)) == case["resized"]


@pytest.mark.parametrize("case", recorded("smart_nframes"), ids=str)
def test_smart_nframes(case: dict[str, Any]) -> None:
    options = MediaOptions(**case["options"])
    args = (options, case["total_frames"], case["video_fps"], DEFAULTS, MediaLimits(), "video")
    if case["nframes"] == "error":
        with pytest.raises(InputError, match="frames"):
            smart_nframes(*args)
        return
    count = smart_nframes(*args)
    assert count == case["nframes"]
    if case["frame_indices"] is not None:
        assert frame_indices(count, 0, case["total_frames"] - 1) == case["frame_indices"]


def test_frame_indices_are_torchs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        total = int(rng.integers(2, 200_000))
        count = min(total, 2 * int(rng.integers(1, 384)))
        if count >= 2:
            expected = torch.linspace(0, total - 1, count).round().long().tolist()
            assert frame_indices(count, 0, total - 1) == expected


def name_of(case: dict[str, Any]) -> str:
    return case.get("name") or Path(case["file"]).stem


@pytest.mark.parametrize("case", recorded("pixel_values"), ids=name_of)
def test_pixels_are_transformers_pixels(case: dict[str, Any]) -> None:
    """Within 2 of 255 levels before normalisation, on every row that was recorded."""
    options = MediaOptions(**case["options"])
    if case["kind"] == "image":
        _, pixels = load("image", DATA / case["file"], options)
    else:
        _, pixels = load("video", [DATA / name for name in case["files"]], options)
        assert list(pixels.shape[1:3]) == case["resized"]
    patches = cut_patches(
        torch.from_numpy(pixels.copy()),
        DEFAULTS.image_mean,
        DEFAULTS.image_std,
        14,
        2,
        2,
        torch.float32,
    )
    assert list(patches.shape) == case["shape"]
    expected = np.load(DATA / "pixel_values.npz")[name_of(case)]
    levels = np.abs(patches[case["rows"]].numpy() - expected) * 255 * max(DEFAULTS.image_std)
    assert levels.max() <= 2.0
    assert abs(float(patches.mean()) - case["mean"]) < 0.01
    assert abs(float(patches.std()) - case["std"]) < 0.01


@pytest.mark.lesson("L33")
@pytest.mark.parametrize("case", recorded("mrope_positions"), ids=lambda c: str(c["delta"]))
def test_mrope_resume(case: dict[str, Any]) -> None:
    """What follows an item starts at the maximum over all axes + 1, videos of many frames too."""
    ids = case["input_ids"]
    grids = {151655: iter(case["image_grid_thw"]), 151656: iter(case["video_grid_thw"])}
    spans, at = [], 0
    while at < len(ids):
        if ids[at] in grids:
            grid = tuple(next(grids[ids[at]]))
            count = int(np.prod(grid)) // 4
            spans.append(MediaSpan(at, count, grid))
            at += count
        else:
            at += 1
    positions, delta = mrope_positions(len(ids), spans, 2)
    assert [list(axis) for axis in positions] == case["positions"]
    assert delta == case["delta"]


@pytest.mark.lesson("L10")
def test_extreme_images_of_every_size() -> None:
    """From 1 to 20,000 a side: a size that fits patches and limits, or a clear refusal."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(np.exp(rng.uniform(0, np.log(20_000)))) for _ in range(2))
        try:
            size = image_size(height, width, MediaOptions(), DEFAULTS, 28, "image")
        except InputError:
            assert max(height, width) > 200 * min(height, width)
            continue
        assert size[0] % 28 == size[1] % 28 == 0
        assert min(size) >= 28
        assert size[0] * size[1] <= DEFAULTS.max_pixels


@pytest.mark.lesson("L10")
@pytest.mark.parametrize("size", [(26, 28), (332, 27), (1, 150), (200, 1), (1, 1), (5000, 30)])
def test_extreme_images_decode(size: tuple[int, int]) -> None:
    _, pixels = load("image", Image.new("RGB", size, "red"))
    goal = image_size(size[1], size[0], MediaOptions(), DEFAULTS, 28, "image")
    assert pixels.shape == (1, *goal, 3) and (pixels == [255, 0, 0]).all()
