"""Workers that were started apart (`octavo worker`) and an engine that joins them over loopback:
the same answers, one engine at a time, and what does not fit is refused with the way out."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.robustness import at_steps
from octavo.engine.cli.main import app
from octavo.engine.config.engine_config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.worker.link import WorkerGroupError
from octavo.engine.worker.loading import start_loading
from octavo.engine.worker.remote import join as remote
from octavo.engine.worker.remote.fingerprint import fingerprint
from octavo.tests.support.kept_worker import Kept, keep

PARAMS = octavo.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 16 << 20,
    "max_num_batched_tokens": 64,
}
ASKED = [[{"role": "user", "content": text}] for text in ("Who are you?", "What is this?", "Hm")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Iterator[list[Kept]]:
    """Two that are ready; the second got its rank from torchrun's variables."""
    port = str(_free_port())
    kept = [
        keep(checkpoint, "--listen", "127.0.0.1:0", "--rank", "0"),
        keep(checkpoint, "--listen", f"127.0.0.1:{port}", env={"RANK": "1", "LOCAL_RANK": "2"}),
    ]
    for each in kept:
        each.read()
    assert kept[1].address == f"127.0.0.1:{int(port) + 2}"
    for each in kept:
        each.follow()
    yield kept
    assert [each.close() for each in kept] == [0, 0]


def _free_port() -> int:
    from octavo.engine.worker.remote.address import Address
    from octavo.engine.worker.remote.supervisor import free_address

    return free_address(Address("127.0.0.1", 0)).port


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        return answers(llm)


def answers(llm: octavo.LLM) -> list[list[int]]:
    outs = llm.chat(ASKED, PARAMS)
    assert [out.error for out in outs] == [""] * len(outs)
    return [out.outputs[0].token_ids for out in outs]


def engine(checkpoint: Path, pair: list[Kept]) -> octavo.LLM:
    return octavo.LLM(checkpoint, **SETTINGS, workers=[each.address for each in pair])


def test_the_same_answers_engine_after_engine(
    checkpoint: Path, pair: list[Kept], expected: list[list[int]]
) -> None:
    pids = []
    for _ in range(2):
        with engine(checkpoint, pair) as llm:
            assert llm.engine.config.tensor_parallel_size == 2
            assert answers(llm) == expected
            pids += [*llm.engine.worker_pids]
    assert len(set(pids)) == 4  # each engine had new processes


def test_ranks_on_one_machine_share_its_cores(
    checkpoint: Path, pair: list[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.engine.worker import group

    told: list[list[int]] = []

    def watched(workers: Any, config: Any, meeting: Any, sharing: Sequence[int]) -> Any:
        told.append(list(sharing))
        return start_loading(workers, config, meeting, sharing)

    monkeypatch.setattr(group, "start_loading", watched)
    with engine(checkpoint, pair):
        pass
    with octavo.LLM(checkpoint, **SETTINGS, tensor_parallel_size=2):
        pass
    assert told == [[2, 2], []]


def test_a_worker_that_is_killed_comes_back(
    checkpoint: Path,
    pair: list[Kept],
    expected: list[list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with engine(checkpoint, pair) as llm:
        before = llm.engine.worker_pids
        at_steps(llm, {5}, lambda: os.kill(before[1], signal.SIGKILL))
        assert answers(llm) == expected
        assert not set(llm.engine.worker_pids) & set(before)
        assert len(llm.engine.restarts.times) == 1
    (told,) = [line for line in caplog.messages if line.endswith("restarting the workers")]
    assert told.startswith(f"the worker of rank 1 ({pair[1].address}) has ended")
    assert sum("sending step" in line for line in caplog.messages) <= 2  # once a rank


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_killed_by_its_keeper(
    checkpoint: Path, pair: list[Kept], expected: list[list[int]]
) -> None:
    """It answers nothing, not even that it is to end."""
    with engine(checkpoint, pair) as llm:
        before = llm.engine.worker_pids
        at_steps(llm, {5}, lambda: os.kill(before[1], signal.SIGSTOP))
        assert answers(llm) == expected
        assert before[1] not in llm.engine.worker_pids
        assert len(llm.engine.restarts.times) == 1


def test_a_checkpoint_that_changed_while_a_worker_waited_is_seen(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    write_tiny_checkpoint(tmp_path, seed=5)
    kept = keep(tmp_path, "--listen", "127.0.0.1:0", "--rank", "0")
    kept.read()
    old = kept.pid
    write_tiny_checkpoint(tmp_path)
    with octavo.LLM(tmp_path, **SETTINGS, workers=[kept.address]) as llm:
        assert answers(llm) == expected
        assert llm.engine.worker_pids != (old,)
    assert kept.close() == 0


def test_a_proxy_is_not_asked(
    checkpoint: Path, pair: list[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would dial a loopback of its own."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(remote, "JOIN_TIMEOUT", 20.0)
    with engine(checkpoint, pair) as llm:
        assert answers(llm)


@pytest.mark.slow
def test_a_worker_ends_with_its_keeper_though_it_is_stopped(checkpoint: Path) -> None:
    kept = keep(checkpoint, "--listen", "127.0.0.1:0", "--rank", "0")
    kept.read()
    os.kill(kept.pid, signal.SIGSTOP)
    assert kept.close() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(kept.pid, 0)


def test_an_engine_that_closes_waits_for_no_worker(checkpoint: Path) -> None:
    """All are told to stop at once, and a request runs."""
    kept = keep(checkpoint, "--listen", "127.0.0.1:0", "--rank", "0")
    kept.read()
    settings = {**SETTINGS, "max_model_len": 4096}
    engine = octavo.AsyncLLM(checkpoint, **settings, workers=[kept.address])

    async def ask_and_stop() -> None:
        params = replace(PARAMS, max_tokens=4000)
        async for _ in engine.generate({"prompt_token_ids": [5, 6]}, params):
            assert kept.close() == 0
            break

    asyncio.run(ask_and_stop())
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()


def test_a_worker_that_hangs_in_being_joined_is_given_up(checkpoint: Path) -> None:
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        config = EngineConfig(model=checkpoint, workers=(address,))
        workers, given_up = remote.RemoteWorkers(config, "engine", 1), threading.Event()
        failed: list[Exception] = []

        def join() -> None:
            try:
                workers.join(True, given_up)
            except Exception as error:
                failed.append(error)

        joining = threading.Thread(target=join, daemon=True)
        joining.start()
        silent.accept()[0].detach()
        given_up.set()
        joining.join(5)  # gRPC's own patience is 20 s
        assert not joining.is_alive()
        assert [type(error) for error in failed] == [WorkerGroupError]


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [True, False])
def test_a_server_stops_with_its_workers(checkpoint: Path, leaves: bool) -> None:
    kept = keep(checkpoint, "--listen", "127.0.0.1:0", "--rank", "0")
    kept.read()
    options = ("--max-model-len", "16384", "--port", "0", "--workers", kept.address)
    command = [
        sys.executable,
        "-P",
        "-m",
        "octavo.engine.cli.main",
        "serve",
        "--model",
        str(checkpoint),
    ]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = server.stdout.readline().split("grpc=")[1].split()[0]
    with octavo.Client(address) as client:
        stream = client.generate([5, 6], max_tokens=16000, ignore_eos=True)
        next(stream)
        if leaves:
            stream.close()
        kept.process.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGTERM)
        assert server.wait(40) == 0
    assert kept.process.wait(20) == 0


def test_a_second_engine_waits_its_turn(
    checkpoint: Path, pair: list[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(checkpoint, pair) as llm:
        monkeypatch.setattr(remote, "JOIN_TIMEOUT", 1.0)
        with pytest.raises(RuntimeError, match="is not reachable: it serves another engine"):
            engine(checkpoint, pair)
        assert answers(llm)


def test_a_worker_whose_engine_was_killed_is_free_again(checkpoint: Path, pair: list[Kept]) -> None:
    script = (
        "import octavo, os, signal, sys\n"
        f"octavo.LLM({str(checkpoint)!r}, workers={[each.address for each in pair]!r}, "
        f"**{SETTINGS!r})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    with engine(checkpoint, pair) as llm:
        assert answers(llm)


def test_other_weights_are_rejected(
    checkpoint: Path, pair: list[Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny_checkpoint(tmp_path, seed=1)
    assert fingerprint(other) != fingerprint(checkpoint)
    with pytest.raises(ConfigError, match=r"rank 0 .* has other weights than .* start it with"):
        engine(other, pair)


def test_ranks_in_the_wrong_order_are_rejected(checkpoint: Path, pair: list[Kept]) -> None:
    with pytest.raises(ConfigError, match="started with --rank 1, but is at index 0 of workers"):
        engine(checkpoint, pair[::-1])


def test_another_version_is_rejected(
    checkpoint: Path, pair: list[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "__version__", "0.0.1")
    with pytest.raises(ConfigError, match=r"the engine 0\.0\.1; install the same"):
        engine(checkpoint, pair)


@pytest.mark.parametrize(
    ("workers", "text"),
    [
        (("10.0.0.2:7000",), "10.0.0.2:7000 is on another machine and requires mutual TLS"),
        (("127.0.0.1:7000", "10.0.0.2:7000"), "cannot reach 127.0.0.1:7000, a loopback"),
        (("10.0.0.2:7000", "10.0.0.2:7000"), "an address is repeated"),
        (("10.0.0.2",), "must be HOST:PORT"),
        (("10.0.0.2:99999",), "a port of at most 65535"),
    ],
)
def test_workers_that_are_no_group_are_rejected(workers: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        remote.check_workers(EngineConfig(workers=workers))


def test_the_number_of_ranks_is_that_of_workers() -> None:
    with pytest.raises(ConfigError, match="there are 2 workers; remove"):
        EngineConfig(workers=("a:1", "b:1"), tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="worker_tls=/x: requires workers"):
        EngineConfig(worker_tls=Path("/x"))
    with pytest.raises(ConfigError, match="must be a list of HOST:PORT"):
        EngineConfig(workers="a:1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--listen", "0.0.0.0:0", "--rank", "0"], "is open to other machines and requires mutual"),
        (
            ["--listen", "127.0.0.1:0"],
            "--rank is required, or set the environment variable RANK",
        ),
        (["--listen", "127.0.0.1", "--rank", "0"], "must be HOST:PORT"),
        (["--listen", "192.0.2.1:7000", "--rank", "0", "--tls", "/nowhere"], "cannot be read"),
    ],
)
def test_a_worker_that_no_one_could_use_does_not_start(args: list[str], text: str) -> None:
    done = CliRunner().invoke(app, ["worker", *args])
    assert done.exit_code == 2 and text in done.stderr
