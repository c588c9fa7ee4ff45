"""`octavo trace`: what is recorded of a run, made-up or real, and its picture."""

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.trace import demo as trace_demo
from octavo.benchmarks.trace import plot
from octavo.benchmarks.trace.plot import Trace, TraceError, draw, parse_steps
from octavo.engine.cli.main import app
from octavo.engine.errors import ConfigError

PARAMS = octavo.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = CliRunner().invoke(app, ["trace", *arguments])
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "demo.jsonl"
    trace_demo.record(path)
    return path


def test_the_demo_shows_everything(demo: Path) -> None:
    trace = Trace.read(demo)
    states = set(trace.states().ravel().tolist())
    assert states == set(range(6))  # not there, waiting, prefill, encode, decode, preempted
    ended = {each["request"]: each["status"] for s in trace.steps for each in s["ended"]}
    assert set(ended.values()) == {"length", "abort", "error"}
    assert set(ended) == set(trace.names), "each request ends, and is told to"
    assert any(each["cached"] for step in trace.steps for each in step["started"])
    assert any(step["copies"] for step in trace.steps)
    assert any(step["evicted"] for step in trace.steps)
    assert any(not row["samples"] for step in trace.steps for row in step["rows"])


def test_the_demo_is_the_same_each_time(demo: Path, tmp_path: Path) -> None:
    trace_demo.record(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == demo.read_bytes()


def test_what_the_states_say_is_what_ran(demo: Path) -> None:
    """A request's cells are one stretch from its coming to its end; blocks and tokens add up."""
    trace = Trace.read(demo)
    states = trace.states()
    for row in range(len(trace.names)):
        there = np.flatnonzero(states[row] != plot.NOT_THERE)
        assert (np.diff(there) == 1).all()
    for column, step in enumerate(trace.steps):
        running = [row["request"] for row in step["rows"]]
        drawn = np.isin(states[:, column], (plot.PREFILL, plot.ENCODE, plot.DECODE))
        assert {trace.names[row] for row in np.flatnonzero(drawn)} == set(running)
        assert step["cached_blocks"] <= step["free_blocks"] <= trace.limits["num_blocks"]
        tokens = sum(row["count"] for row in step["rows"])
        assert tokens <= trace.limits["max_num_batched_tokens"]


def picture_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def rgb(state: int) -> tuple[int, ...]:
    return tuple(bytes.fromhex(plot.COLORS[state][1:]))


def test_the_picture_has_each_color(demo: Path, tmp_path: Path) -> None:
    draw(Trace.read(demo), tmp_path / "demo.png")
    pixels = picture_of(tmp_path / "demo.png").reshape(-1, 3)
    for state in range(1, 6):
        assert (pixels == rgb(state)).all(axis=1).sum() > 500, plot.LABELS[state]


def test_some_steps_alone(demo: Path, tmp_path: Path) -> None:
    whole, part = Trace.read(demo), Trace.read(demo, 14, 17)
    assert [step["step"] for step in part.steps] == [14, 15, 16]
    row, there = whole.names.index("dog?"), part.names.index("dog?")
    assert part.states()[there].tolist() == whole.states()[row, 13:16].tolist()
    assert part.states()[there, 0] == plot.PREEMPTED
    done = cli("draw", str(demo), "--steps", "2:9", "--out", str(tmp_path / "part.svg"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "part.svg").read_text().startswith("<?xml")


def test_a_trace_that_was_cut_off_can_be_drawn(demo: Path, tmp_path: Path) -> None:
    text = demo.read_text()
    (tmp_path / "cut.jsonl").write_text(text[:-40])
    assert len(Trace.read(tmp_path / "cut.jsonl").steps) == len(Trace.read(demo).steps) - 1


def test_a_long_run_can_be_drawn(demo: Path, tmp_path: Path) -> None:
    lines = demo.read_text().splitlines()
    (tmp_path / "long.jsonl").write_text("\n".join([lines[0], *lines[1:] * 100, ""]))
    draw(Trace.read(tmp_path / "long.jsonl"), tmp_path / "long.png")
    assert picture_of(tmp_path / "long.png").shape[1] < 6000


def test_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    done = cli("demo", str(path))
    assert done.returncode == 0 and "octavo trace draw" in done.stdout
    done = cli("draw", str(path))
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "run.png")
    assert picture_of(tmp_path / "run.png").size


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "not a trace"), ("no json\n", "not a trace"), ("[1]\n", "not a"), ("{}\n", "not a")],
)
def test_what_is_no_trace_is_said_so(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x").write_text(text)
    done = cli("draw", str(tmp_path / "x"))
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_steps_that_are_not_there(demo: Path) -> None:
    with pytest.raises(TraceError, match="none of them in 99:"):
        Trace.read(demo, 99)
    for wrong in ("7", "a:b", "-3:4"):
        with pytest.raises(TraceError, match="FIRST:END"):
            parse_steps(wrong)
    assert parse_steps(None) == (0, None) and parse_steps("3:") == (3, None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def real(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    path = tmp_path_factory.mktemp("trace") / "real.jsonl"
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 512}
    image = Image.fromarray(np.zeros((56, 84, 3), np.uint8))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "A secret question"}]
    with octavo.LLM(checkpoint, trace_file=path, **settings) as llm:
        outs = [llm.chat([{"role": "user", "content": parts}], PARAMS)[0] for _ in range(2)]
        llm.engine.add_request("dropped", "Hi", PARAMS)
        llm.engine.step()
        llm.engine.abort("dropped")
        llm.generate("Bye", PARAMS)
        llm.engine.add_request("late", "Late", PARAMS, timeout_s=0)
        assert "DEADLINE" in llm.engine.step()[0].error
        stop = llm.generate("Hi", PARAMS)[0].outputs[0].text[2]
        outs.append(llm.generate("Hi", replace(PARAMS, stop=(stop,)))[0])
        llm.engine.add_request("last", "Late", PARAMS, timeout_s=0)
        llm.engine.step()
    yield path, outs


def test_a_real_run(real: tuple[Path, Any]) -> None:
    path, outs = real
    trace = Trace.read(path)
    first, second, stopped = outs
    assert trace.names[:3] == [first.request_id, second.request_id, "dropped"]
    started = {each["request"]: each["cached"] for s in trace.steps for each in s["started"]}
    assert started[first.request_id] == 0
    assert started[second.request_id] == second.usage.cached_tokens > 0
    encoded = [each for step in trace.steps for each in step["encode"]]
    assert encoded == [{"request": first.request_id, "tokens": 6}]
    ended = {each["request"]: each["status"] for s in trace.steps for each in s["ended"]}
    assert ended["dropped"] == "abort" and ended[first.request_id] == "length"
    assert ended[stopped.request_id] == "stop" and ended["late"] == ended["last"] == "error"
    assert sorted(ended.values()) == ["abort", "error", "error", *["length"] * 4, "stop"]
    times = [step["time"] for step in trace.steps]
    run = [step["run_ms"] for step in trace.steps[:-1]]
    assert times == sorted(times) and min(run) >= 0
    assert sorted(run)[len(run) // 4] > 0  # 0 where the answers of two steps were seen at once
    assert trace.steps[-1]["rows"] == []  # the last end, which no step followed


def test_a_name_that_is_used_again_and_a_step_that_no_one_sees(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "again.jsonl"
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "trace_file": path}
    with octavo.LLM(checkpoint, **settings) as llm:
        text = llm.generate("Hi there", PARAMS)[0].outputs[0].text
        llm.generate("Hi there", replace(PARAMS, stop=(text[2],)))  # leaves a step on its way
        time.sleep(3)  # longer than any step, so that a step that includes it is seen
        for _ in range(2):
            llm.engine.add_request("same", "Another", PARAMS)
            while llm.engine.has_requests:
                llm.engine.step()
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    same = [row for line in lines for row in line["rows"] if row["request"] == "same"]
    counts = [row["count"] for row in same]
    assert len(counts) == 12 and counts[0] == counts[6] > 1, "both prompts are in it"
    started = [each for line in lines for each in line["started"] if each["request"] == "same"]
    assert [each["cached"] for each in started] == [0, 0]
    ended = {e["request"]: n for n, line in enumerate(lines) for e in line["ended"]}
    for number, line in enumerate(lines):
        for row in line["rows"]:
            assert number <= ended[row["request"]]
    assert max(line["run_ms"] for line in lines) < 2900


def test_a_trace_holds_no_prompt(real: tuple[Path, Any]) -> None:
    text = real[0].read_text()
    assert "secret" not in text
    assert set(json.loads(text.splitlines()[1])["rows"][0]) == {
        "request", "start", "count", "samples"
    }  # fmt: skip


def test_a_trace_file_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    where = tmp_path / "no" / "such.jsonl"
    with pytest.raises(ConfigError, match=r"trace_file=.*such\.jsonl: No such file"):
        octavo.LLM(checkpoint, dtype="float32", max_model_len=512, trace_file=where)


def test_a_disk_that_is_full_ends_the_trace_alone(checkpoint: Path) -> None:
    with octavo.LLM(
        checkpoint, dtype="float32", max_model_len=512, trace_file=Path("/dev/full")
    ) as llm:
        assert len(llm.generate("Hi", PARAMS)[0].outputs[0].token_ids) == 6


def test_a_request_that_was_preempted_before_the_steps_drawn_is_red(tmp_path: Path) -> None:
    lines = [{"octavo_trace": 1}]
    for number in (1, 2, 3):
        step = {"step": number, "rows": [], "idle": ["held"], "encode": [], "waiting": ["lost"]}
        lines.append({**step, "preempted": ["lost"] if number == 1 else []})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = Trace.read(tmp_path / "t.jsonl", 2)
    assert trace.names == ["lost", "held"]
    red, grey = plot.PREEMPTED, plot.WAITING
    assert trace.states().tolist() == [[red, red], [grey, grey]]
