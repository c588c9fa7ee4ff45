"""`octavo bench media`: both sides compute the same pixels, and the figures are correct."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from octavo.benchmarks.cli import bench_app
from octavo.benchmarks.media import speed
from octavo.benchmarks.media.cases import encoded, load, photo
from octavo.benchmarks.media.fuzz import FORMS, broken_files
from octavo.benchmarks.media.speed import bare_image, image_case, measure


def test_both_sides_compute_the_same_pixels() -> None:
    data = encoded(photo(200, 150), "JPEG", quality=90)
    item, pixels = load("image", data)
    bare = bare_image(data, item.info.height, item.info.width)
    np.testing.assert_array_equal(pixels[0], np.asarray(bare))


def test_a_row_is_a_ratio_of_two_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a fake clock on which ours takes three seconds and bare two."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def takes(duration: float) -> None:
        now[0] += duration

    case = speed.Case("it", ours=lambda where: takes(3.0), bare=lambda: takes(2.0))
    found = measure(case, 3)
    assert (found.ours, found.bare, found.times_bare) == (1 / 3, 1 / 2, 1.5)
    assert found.times_here == found.pool == 1.0  # the fake clock ignores threads


def test_command_writes_one_row_per_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(64, 48), "JPEG")
    monkeypatch.setattr(speed, "cases", lambda: iter([image_case("small", data)]))
    monkeypatch.setattr(speed, "AT_LEAST", 0.001)
    path = tmp_path / "found.json"
    done = CliRunner().invoke(bench_app, ["media", "--rounds", "1", "--json", str(path)])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(path.read_text())["rows"]
    assert row["name"] == "small → 56×56" and row["times_bare"] > 0 and row["pool"] > 0


def test_damaged_files_cover_all_formats_and_depend_on_the_seed() -> None:
    once = list(broken_files(3, 2 * len(FORMS)))
    assert once == list(broken_files(3, 2 * len(FORMS)))
    assert once != list(broken_files(4, 2 * len(FORMS)))
    assert [form for form, _ in once] == list(FORMS) * 2
