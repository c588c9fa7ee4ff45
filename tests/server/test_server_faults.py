"""`octavo serve` when its workers fail, and when it fails itself."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Server, alive, start, wait_for
from octavo.engine.client.client import ClientError
from octavo.engine.utils import failpoints

LONG: dict[str, Any] = {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def conversation(seed: int) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    image = {"type": "image", "image": Image.fromarray(pixels)}
    return [{"role": "user", "content": [image, {"type": "text", "text": f"What is {seed}?"}]}]


def talk(server: Server, count: int = 3) -> list[tuple[list[int], str]]:
    """Tokens, and how it ended, of several streams at once."""
    found: list[tuple[list[int], str]] = [([], "")] * count

    def one(index: int) -> None:
        tokens: list[int] = []
        end = ""
        with octavo.Client(server.address) as client:
            try:
                for delta in client.chat(conversation(index), **LONG):
                    tokens += delta.token_ids
                    end = delta.finish_reason or end
            except ClientError as error:
                end = error.code
        found[index] = (tokens, end)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[tuple[list[int], str]]:
    server = start(checkpoint)
    found = talk(server)
    assert server.end() == 0
    assert [end for _, end in found] == ["length"] * 3
    return found


def test_streams_go_on_when_a_worker_is_killed(
    checkpoint: Path,
    expected: list[tuple[list[int], str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    faults = ("worker.computed@1=kill#60", "worker.replies@0=oom#90")
    rules = [f"{rule}!{tmp_path / str(number)}" for number, rule in enumerate(faults)]
    monkeypatch.setenv(failpoints.VARIABLE, ";".join(rules))
    server = start(checkpoint, "--tensor-parallel-size", "2")
    assert talk(server) == expected
    assert len(list(tmp_path.iterdir())) == 2
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        serving = health.Check(health_pb2.HealthCheckRequest()).status
    assert serving == health_pb2.HealthCheckResponse.SERVING
    wait_for(lambda: not any(map(alive, server.worker_pids)))
    assert server.end() == 0
    assert server.text().count("restarting the workers") == 2


def at_each_place(actions: tuple[str, ...], fast: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("place", "action"),
        [
            pytest.param(place, action, marks=() if (place, action) == fast else pytest.mark.slow)
            for place in ("engine.planned", "group.sends", "group.sent", "engine.stepped")
            for action in actions
        ],
    )


@at_each_place(("raise", "oom"), fast=("engine.planned", "raise"))
def test_an_error_in_the_engine_s_step_is_survived(
    checkpoint: Path,
    expected: list[tuple[list[int], str]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    action: str,
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"{place}={action}#40")
    server = start(checkpoint)
    assert talk(server) == expected
    assert server.end() == 0
    assert "a step failed in the engine" in server.text()


@at_each_place(("kill", "exit"), fast=("group.sent", "kill"))
def test_when_the_engine_ends_clients_know_and_nothing_is_left(
    checkpoint: Path,
    expected: list[tuple[list[int], str]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    action: str,
) -> None:
    folder = tempfile.mkdtemp()  # a short name: it is to hold Unix sockets
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setenv(failpoints.VARIABLE, f"{place}={action}#40")
    server = start(checkpoint)
    assert [path.name[:7] for path in Path(folder).iterdir() if path.is_dir()] == ["octavo-"]
    for (tokens, end), (wanted, _) in zip(talk(server), expected, strict=True):
        assert end == "UNAVAILABLE"
        assert tokens == wanted[: len(tokens)] and len(tokens) < len(wanted)
    assert server.process.wait(30) == {"kill": -9, "exit": 3}[action]
    wait_for(lambda: not any(map(alive, server.worker_pids)))
    assert not [path for path in Path(folder).iterdir() if path.is_dir()]
    shutil.rmtree(folder)
