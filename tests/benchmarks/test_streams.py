"""`octavo bench streams` with few streams, and the mapping of texts to steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from octavo.benchmarks.cli import bench_app
from octavo.benchmarks.streams.run import place
from octavo.benchmarks.streams.server import LETTERS

CYCLE = len(LETTERS)


@pytest.mark.parametrize("first", [0, 5, CYCLE + 3, 3 * CYCLE])
@pytest.mark.parametrize("delay", [0.001, 0.5])
def test_text_identifies_its_steps(first: int, delay: float) -> None:
    moments = np.arange(5 * CYCLE) * 0.02
    steps = np.arange(first, first + CYCLE + 20)
    text = [LETTERS[step % CYCLE] for step in steps]
    late = 2.5  # delay of the first pieces in s: more than a cycle, which later pieces reveal
    came = moments[steps] + np.where(steps < first + 9, late, delay)
    pieces = list(zip(came.tolist(), text, strict=True))
    found, when = place(pieces, moments)
    assert (found == steps).all() and (when == came).all()


def test_piece_with_several_tokens() -> None:
    steps, came = place([(9.0, LETTERS[3:5]), (9.5, LETTERS[5:8])], np.arange(10.0))
    assert steps.tolist() == [3, 4, 5, 6, 7] and came.tolist() == [9.0] * 2 + [9.5] * 3


@pytest.mark.parametrize(("text", "at"), [("ac", 9.0), ("aab", 9.0), ("ab", 0.5), ("", 9.0)])
def test_inconsistent_text_is_rejected(text: str, at: float) -> None:
    with pytest.raises(ValueError, match="text"):
        place([(at, text)], np.arange(10.0))


def test_streams_command(tmp_path: Path) -> None:
    options = ["--streams", "6", "--sleep-ms", "4", "--seconds", "1"]
    command = ["streams", *options, "--json", str(tmp_path / "found.json")]
    found = CliRunner().invoke(bench_app, command)
    assert found.exit_code == 0, found.output
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert [run["kind"] for run in runs] == ["grpc", "http"]
    for run in runs:
        assert run["step_ms"] >= 4 and run["steps"] >= 20
        assert 0 < run["delay_p50_ms"] <= run["delay_p99_ms"]
        assert 0 < run["making_ms"] + run["handing_ms"] < run["step_cpu_ms"]
        assert run["serving_ms"] > 0 and run["tokens_per_piece"] >= 1
        assert f"{run['tokens_per_s']:,.0f}" in found.output


@pytest.mark.parametrize("wrong", [["--door", "carrier-pigeon"], ["--streams", "0"]])
def test_invalid_options(wrong: list[str]) -> None:
    found = CliRunner().invoke(bench_app, ["streams", *wrong])
    assert found.exit_code != 0 and wrong[0] in found.output
