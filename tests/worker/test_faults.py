"""Worker failures: kills, hangs, exceptions, out of memory.

Workers are restarted, and no stream loses or repeats a token.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.robustness import at_steps
from octavo.engine.errors import EngineDead
from octavo.engine.utils import failpoints as failpoint
from octavo.engine.worker import link, watch
from octavo.engine.worker.process import WORKER_MODULE

# With penalties: workers store the token history, which is resent after a restart.
PARAMS = octavo.SamplingParams(
    temperature=0, repetition_penalty=1.5, frequency_penalty=1.2, max_tokens=40, ignore_eos=True
)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 16 << 20,
    "max_num_batched_tokens": 40,
}


def ask(text: str, seed: int | None = None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if seed is not None:
        rng = np.random.default_rng(seed)
        image = Image.fromarray(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8))
        parts.insert(0, {"type": "image", "image": image})
    return [{"role": "user", "content": parts}]


FAST = [("received", "kill"), ("computed", "oom")]
CONVERSATIONS = [ask("Who are you?"), ask("What is it?", 1), ask("And this one here?", 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        return tokens(llm.chat(CONVERSATIONS, PARAMS))


def tokens(outs: list[octavo.RequestOutput]) -> list[list[int]]:
    assert [out.error for out in outs] == [""] * len(outs)
    return [out.outputs[0].token_ids for out in outs]


@pytest.mark.parametrize("step", [1, 12])
def test_killed_worker_is_restarted(checkpoint: Path, expected: list[list[int]], step: int) -> None:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        before = llm.engine.worker_pids
        at_steps(llm, {step}, lambda: os.kill(before[0], signal.SIGKILL))
        assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected
        assert llm.engine.worker_pids != before
        llm.engine.scheduler.check_integrity()
        assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected


def test_killing_one_of_two_ranks_restarts_both(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    with octavo.LLM(checkpoint, **SETTINGS, tensor_parallel_size=2) as llm:
        before = llm.engine.worker_pids
        at_steps(llm, {9}, lambda: os.kill(before[1], signal.SIGKILL))
        assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected
        assert not set(llm.engine.worker_pids) & set(before)


def test_hung_worker_is_detected_by_ping_timeout(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PING_TIMEOUT", 1.0)
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        at_steps(llm, {9}, lambda: os.kill(llm.engine.worker_pids[0], signal.SIGSTOP))
        start = time.monotonic()
        assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected
        assert time.monotonic() - start < 60


def test_worker_killed_while_idle_is_restarted(checkpoint: Path, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with octavo.AsyncLLM(checkpoint, **SETTINGS) as engine:
            before = engine.worker_pids
            os.kill(before[0], signal.SIGKILL)
            deadline = time.monotonic() + 30
            while engine.worker_pids == before or not engine.worker_pids:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            stream = engine.chat(CONVERSATIONS[1], PARAMS)
            assert [t async for delta in stream for t in delta.token_ids] == expected[1]

    asyncio.run(scenario())


def test_requests_that_wait_for_workers_are_counted(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count as preparing: no step includes them, so they are neither running nor waiting."""

    async def scenario() -> None:
        async with octavo.AsyncLLM(checkpoint, **SETTINGS) as engine:
            stats, go_on = engine.engine.stats, threading.Event()
            group, restart = engine.engine.group, engine.engine.group.restart
            monkeypatch.setattr(group, "restart", lambda: (go_on.wait(60), restart()))
            os.kill(engine.worker_pids[0], signal.SIGKILL)
            while not engine.engine.restarts._away_since:
                await asyncio.sleep(0.01)
            stream = engine.chat(CONVERSATIONS[1], PARAMS)
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(1)
            assert stats.load().num_preparing == 1 and not first.done()
            go_on.set()
            ids = [*(await first).token_ids]
            assert stats.load().num_preparing == 0
            assert ids + [t async for delta in stream for t in delta.token_ids] == expected[1]

    asyncio.run(scenario())


def test_engine_stops_with_the_cause_above_max_restarts(checkpoint: Path) -> None:
    with octavo.LLM(checkpoint, **SETTINGS, max_restarts=1) as llm:
        at_steps(llm, {3}, lambda: os.kill(llm.engine.worker_pids[0], signal.SIGKILL))
        llm.chat(CONVERSATIONS, PARAMS)
        at_steps(llm, {3}, lambda: os.kill(llm.engine.worker_pids[0], signal.SIGKILL))
        with pytest.raises(EngineDead, match=r"rank 0 .* was killed by signal 9"):
            llm.chat(CONVERSATIONS, PARAMS)


@pytest.fixture
def failpoints(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def switch_on(rules: str) -> None:
        monkeypatch.setenv(failpoint.VARIABLE, rules)

    yield switch_on


PLACES = [
    pytest.param(place, action, marks=() if (place, action) in FAST else pytest.mark.slow)
    for place in ("received", "unpacked", "computed", "replies")
    for action in ("kill", "raise", "exit", "oom")
]


@pytest.mark.parametrize(("place", "action"), PLACES)
def test_failure_at_each_point_of_a_worker_step(
    checkpoint: Path,
    expected: list[list[int]],
    failpoints: Callable[[str], None],
    tmp_path: Path,
    place: str,
    action: str,
) -> None:
    failpoints(f"worker.{place}={action}#17!{tmp_path / 'once'}")
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected
        assert len(llm.engine.restarts.times) == 1


def test_only_the_request_that_crashes_workers_fails(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is killed whenever that request runs; the other requests continue."""
    with octavo.LLM(checkpoint, **SETTINGS, max_restarts=9) as llm:
        send = llm.engine.group.send
        schedule = llm.engine.scheduler.schedule
        bad = "request-1"
        running: list[tuple[str, ...]] = []

        def watched() -> Any:
            plan = schedule()
            running.append(plan.request_ids if plan else ())
            return plan

        def step(batch: Any, step_id: int) -> Any:
            if bad in running[-1] and len(running) > 6:
                os.kill(llm.engine.worker_pids[0], signal.SIGKILL)
            return send(batch, step_id)

        monkeypatch.setattr(llm.engine.scheduler, "schedule", watched)
        llm.engine.group.send = step  # type: ignore[method-assign]
        outs = llm.chat(CONVERSATIONS, PARAMS)
        assert outs[1].error == "INTERNAL: the request's step crashed the workers twice"
        assert [out.outputs[0].token_ids for out in (outs[0], outs[2])] == [
            expected[0],
            expected[2],
        ]
        assert len(llm.engine.restarts.times) == 2
        llm.engine.scheduler.check_integrity()


def test_deadlines_and_aborts_hold_through_a_restart(checkpoint: Path) -> None:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        engine = llm.engine
        engine.add_request("late", ask("Hi"), PARAMS, timeout_s=0.5)
        engine.add_request("gone", ask("Ho"), PARAMS)
        engine.add_request("stays", ask("Hey"), PARAMS)
        deltas = engine.step()
        os.kill(engine.worker_pids[0], signal.SIGKILL)
        deltas += engine.step()  # takes more than 0.5 s
        assert [d.finish_reason for d in engine.abort("gone")] == ["abort"]
        while engine.has_requests:
            deltas += engine.step()
        last = {d.request_id: d for d in deltas if d.finish_reason}
        assert last["late"].error.startswith("DEADLINE_EXCEEDED") and not last["stays"].error
        engine.scheduler.check_integrity()


def test_failpoint_rules() -> None:
    rules = failpoint.parse("a.b=kill#3;c@1=raise!/tmp/x")
    assert rules == (
        failpoint.Rule("a.b", "kill", None, 3),
        failpoint.Rule("c", "raise", 1, None, "/tmp/x"),
    )
    for wrong in ("a", "a=b", "a=kill#x", "=kill"):
        with pytest.raises(ValueError, match="must be NAME"):
            failpoint.parse(wrong)


def test_deadlocked_ranks_are_detected_by_the_step_time_bound(
    checkpoint: Path,
    expected: list[list[int]],
    failpoints: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They answer pings, but the step never finishes."""
    monkeypatch.setattr(watch, "MIN_BOUND", 2.0)
    failpoints(f"worker.computed@1=wait#17!{tmp_path / 'once'}")
    with octavo.LLM(checkpoint, **SETTINGS, tensor_parallel_size=2) as llm:
        assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected
        assert len(llm.engine.restarts.times) == 1
    assert "a step took far longer than expected for its work" in caplog.text


def test_internal_error_in_a_step_is_recovered(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError("no room for the arrays")

    for overlap in (True, False):
        with octavo.LLM(checkpoint, **SETTINGS, overlap_steps=overlap) as llm:
            at_steps(llm, {5}, fail)
            assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected
            assert tokens(llm.chat(CONVERSATIONS, PARAMS)) == expected
            assert len(llm.engine.restarts.times) == 1


def test_only_the_request_whose_batch_fails_to_build_fails(
    checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        pixels_of = llm.engine._pipeline._pixels_of

        def spoilt(name: str) -> Any:
            if name == "request-1":
                raise KeyError("its pixels")
            return pixels_of(name)

        monkeypatch.setattr(llm.engine._pipeline, "_pixels_of", spoilt)
        outs = llm.chat(CONVERSATIONS, PARAMS)
    assert outs[1].error == "INTERNAL: the request's step crashed the workers twice"
    found = [out.outputs[0].token_ids for out in (outs[0], outs[2])]
    assert found == [expected[0], expected[2]]


def test_step_in_flight_is_received_while_idle(checkpoint: Path) -> None:
    """If it failed, the workers are restarted before the next request."""

    async def scenario() -> None:
        async with octavo.AsyncLLM(checkpoint, **SETTINGS) as engine:
            deltas = [delta async for delta in engine.chat(CONVERSATIONS[0], PARAMS)]
            text = "".join(delta.text for delta in deltas)
            stop = replace(PARAMS, stop=(text[5],))
            group = engine.engine.group
            send, sent = group.send, []

            def watched(batch: Any, step_id: int) -> None:
                send(batch, step_id)
                sent.append(step_id)

            group.send = watched  # type: ignore[method-assign]
            last = [delta async for delta in engine.chat(CONVERSATIONS[0], stop)][-1]
            assert last.finish_reason == "stop"
            deadline = time.monotonic() + 5
            while engine.engine.has_steps:
                assert time.monotonic() < deadline, "the step's result was not received"
                await asyncio.sleep(0.01)
            assert last.usage is not None and len(sent) == last.usage.output_tokens + 1

    asyncio.run(scenario())


def test_exiting_worker_deletes_only_its_socket() -> None:
    """A worker may be started by hand, with its socket in a folder with other files."""
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        mine, socket = Path(folder) / "mine.txt", Path(folder) / "worker.sock"
        mine.write_text("kept")
        command = [sys.executable, "-P", "-m", WORKER_MODULE, "--socket", str(socket)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(30) == 0
        assert [path.name for path in Path(folder).iterdir()] == ["mine.txt"]
