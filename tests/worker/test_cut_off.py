"""Lost messages between the engine and its workers.

A rank that missed a step catches up, each step runs once, and an unreachable rank is replaced.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

import octavo
from octavo.benchmarks.fakes.sleeping_worker import TOKEN
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.robustness import at_steps
from octavo.benchmarks.step_overhead import sleeping
from octavo.engine.utils import failpoints
from octavo.engine.worker import link, process, step_order
from octavo.engine.worker.link import WorkerGroupError, WorkerLink
from octavo.engine.worker.step_order import MissedStep, StepSequence
from octavo.proto import worker_pb2 as pb

PARAMS = octavo.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512}
PROMPTS = ["Who are you?", "What is it?", "And this?"]


# Step order


def test_steps_run_in_order_whatever_their_arrival_order() -> None:
    steps: StepSequence[int] = StepSequence()
    ran: list[int] = []

    def take(step_id: int) -> int:
        return steps.submit(step_id - 1, step_id, lambda: ran.append(step_id) or step_id).result()

    with ThreadPoolExecutor(2) as pool:
        for first in range(1, 41, 2):
            late = pool.submit(take, first + 1)
            time.sleep(0.001 * (first % 3))
            assert pool.submit(take, first).result() == first
            assert late.result() == first + 1
    assert ran == list(range(1, 41))


def test_duplicate_step_is_not_run_again() -> None:
    steps: StepSequence[int] = StepSequence()
    ran: list[int] = []
    first = steps.submit(0, 4, lambda: ran.append(4) or 4)
    second = steps.submit(4, 5, lambda: ran.append(5) or 5)
    assert steps.submit(0, 4, lambda: ran.append(44) or 44) is first
    assert steps.submit(4, 5, lambda: ran.append(55) or 55) is second
    assert (first.result(), second.result(), ran) == (4, 5, [4, 5])
    assert steps.latest == 5


def test_step_after_a_missed_step_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_order, "ORDER_TIMEOUT", 0.05)
    steps: StepSequence[int] = StepSequence()
    steps.submit(0, 1, lambda: 1)
    with pytest.raises(MissedStep, match="step 2 was missed; the latest is 1"):
        steps.submit(2, 3, lambda: 3)
    steps.submit(1, 2, lambda: 2)
    assert steps.submit(2, 3, lambda: 3).result() == 3


def test_step_after_a_failed_step_fails() -> None:
    """The later step depends on the results of the earlier one."""
    steps: StepSequence[int] = StepSequence()
    first = steps.submit(0, 1, lambda: 1 // 0)
    second = steps.submit(1, 2, lambda: 2)
    assert isinstance(first.exception(), ZeroDivisionError)
    assert "the previous step failed" in str(second.exception())


# Pings


class Stub:
    """A worker stub whose ping answer is set by the test."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()
        self.Ping = self

    def future(self, request: Any, timeout: float) -> Future[Any]:
        return self.answer


class Unavailable(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Stub, list[float]]]:
    """Yield a worker link without a process, its stub, and the fake clock."""
    now = [100.0]
    monkeypatch.setattr(link.time, "monotonic", lambda: now[0])
    child = subprocess.Popen(["true"])
    worker = WorkerLink(0, 1, grpc.insecure_channel("unix:unused"), process.ChildProcess(child))
    worker.stub = Stub()
    worker.stub.answer.set_exception(Unavailable())
    yield worker, worker.stub, now
    child.wait()


def test_unreachable_worker_times_out_after_several_pings(watched: Any) -> None:
    worker, _, now = watched
    for _ in range(10):
        worker.check_answers()
        now[0] += 0.5
    with pytest.raises(WorkerGroupError, match="did not answer for 5 s"):
        for _ in range(3):
            worker.check_answers()
            now[0] += 0.5


def test_ping_timeout_excludes_idle_time_and_answered_steps(watched: Any) -> None:
    worker, stub, now = watched
    worker.check_answers()
    now[0] += 3600  # an idle `LLM` sends no pings
    worker.check_answers()
    for _ in range(40):
        worker.check_answers()
        worker.heard()
        now[0] += 0.5
    stub.answer = Future()
    stub.answer.set_result(pb.PingReply(epoch=2))
    worker.check_answers()
    with pytest.raises(WorkerGroupError, match="of epoch 2 and not 1"):
        worker.check_answers()


# Engine and workers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        return answers(llm)


def answers(llm: octavo.LLM) -> list[list[int]]:
    outs = llm.generate(PROMPTS, PARAMS)
    assert [out.error for out in outs] == [""] * len(outs)
    return [out.outputs[0].token_ids for out in outs]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", ["received", "unpacked", "replies"])
def test_lost_steps_and_lost_answers_are_resent(
    checkpoint: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
    ranks: int,
) -> None:
    rules = [f"worker.{place}@{ranks - 1}=cut#{at}!{tmp_path / str(at)}" for at in (1, 7, 8, 20)]
    monkeypatch.setenv(failpoints.VARIABLE, ";".join(rules))
    with octavo.LLM(checkpoint, **SETTINGS, tensor_parallel_size=ranks) as llm:
        pids = llm.engine.worker_pids
        assert answers(llm) == expected
        assert len(list(tmp_path.iterdir())) == 4, "some failpoints did not fire"
        assert llm.engine.worker_pids == pids and llm.engine.restarts.times == []


class Proxy:
    """A proxy between an engine and a worker's socket."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_suffix(".proxy")
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                try:
                    far.connect(str(self._target))
                except OSError:  # the worker does not listen yet
                    near.close()
                    continue
                self._pairs.append((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._open.wait()
                to.sendall(data)
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections; new ones can be opened."""
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def block(self) -> None:
        """Silently stop forwarding data."""
        self._open.clear()


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Proxy]]:
    made: list[Proxy] = []
    connect = process.connect

    def through_a_proxy(target: Path) -> Any:
        made.append(Proxy(target))
        return connect(made[-1].path)

    monkeypatch.setattr(process, "connect", through_a_proxy)
    yield made
    for proxy in made:
        proxy._open.set()
        proxy.cut()


@pytest.mark.parametrize("ranks", [1, 2])
def test_broken_connection_is_reopened(
    checkpoint: Path, expected: list[list[int]], proxies: list[Proxy], ranks: int
) -> None:
    with octavo.LLM(checkpoint, **SETTINGS, tensor_parallel_size=ranks) as llm:
        pids = llm.engine.worker_pids
        at_steps(llm, {3, 4, 11, 25}, lambda: proxies[-1].cut())
        assert answers(llm) == expected
        assert llm.engine.worker_pids == pids and llm.engine.restarts.times == []


def test_unreachable_rank_is_detected_by_ping_timeout_and_replaced(
    checkpoint: Path,
    expected: list[list[int]],
    proxies: list[Proxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "PING_TIMEOUT", 1.0)
    with octavo.LLM(checkpoint, **SETTINGS, tensor_parallel_size=2) as llm:
        before = llm.engine.worker_pids
        at_steps(llm, {9}, lambda: proxies[1].block())
        assert answers(llm) == expected
        assert not set(before) & set(llm.engine.worker_pids)
        assert len(llm.engine.restarts.times) == 1


def test_step_of_another_epoch_is_rejected(checkpoint: Path) -> None:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        group = llm.engine.group
        stub = group._workers[0].stub
        request = pb.StepRequest(epoch=group.epoch + 1, step_id=1)
        with pytest.raises(grpc.RpcError, match="is not the current one") as caught:
            stub.Step(request)
        assert str(group.epoch) not in caught.value.details()  # the epoch is not disclosed
        assert stub.Ping(pb.PingRequest(epoch=group.epoch + 1)).epoch == 0
        assert stub.Ping(pb.PingRequest(epoch=group.epoch)).epoch == group.epoch
        assert answers(llm) == answers(llm)


def test_long_step_does_not_trigger_the_ping_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings are answered during a step, such as a long first encode."""
    monkeypatch.setattr(link, "PING_TIMEOUT", 0.7)
    with sleeping(2500), octavo.LLM(max_num_batched_tokens=1100) as llm:
        pids = llm.engine.worker_pids
        out = llm.generate("Hi", replace(PARAMS, max_tokens=2))[0]
        assert out.outputs[0].token_ids == [TOKEN, TOKEN]
        assert llm.engine.worker_pids == pids and llm.engine.restarts.times == []
