"""A group over a network: two hosts that are network namespaces, a cable between them, mutual TLS
with the certificates of docs/scaling.md. Needs root and iproute2."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.robustness import at_steps
from octavo.engine.errors import ConfigError
from octavo.engine.worker.remote import join
from octavo.tests.support.kept_worker import Kept, keep

HOSTS = ("octavo-a", "octavo-b")
ADDRESSES = ("10.98.7.1", "10.98.7.2")  # those of the page's certificates
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
PARAMS = octavo.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 16 << 20,
    "max_num_batched_tokens": 64,
}
ASKED = [[{"role": "user", "content": text}] for text in ("Who are you?", "What is this?", "Hm")]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@contextmanager
def cable() -> Iterator[None]:
    """The engine's host is this one: it reaches both. Raises CalledProcessError where this process
    may not make a network."""
    made: list[str] = []
    try:
        ip("link", "add", "octavo-br", "type", "bridge")
        ip("addr", "add", "10.98.7.254/24", "dev", "octavo-br")
        ip("link", "set", "octavo-br", "up")
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            ip("netns", "add", host)
            made.append(host)
            end = f"octavo-{number}"
            ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", end, "master", "octavo-br", "up")
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in made:
            ip("netns", "del", host)
        subprocess.run(["ip", "link", "del", "octavo-br"], check=False, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    with cable():
        yield


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's own commands, run."""
    folder = tmp_path_factory.mktemp("group")
    script = next(
        block
        for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.S)
        if "-x509" in block
    )
    subprocess.run(["bash", "-e", "-c", script], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def hosts(network: None, checkpoint: Path, certificates: Path) -> Iterator[list[Kept]]:
    kept = [
        keep(
            checkpoint,
            *("--listen", f"{address}:7000", "--rank", str(rank)),
            *("--tls", str(certificates / f"rank{rank}")),
            within=("ip", "netns", "exec", host),
        )
        for rank, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True))
    ]
    for each in kept:
        each.read()
        each.follow()
    yield kept
    ended = [each.close() for each in kept]
    assert set(ended) <= {0, -signal.SIGKILL}  # a test below kills one


def engine(checkpoint: Path, hosts: list[Kept], tls: Path | None, **settings: Any) -> octavo.LLM:
    addresses = [each.address for each in hosts]
    return octavo.LLM(checkpoint, **SETTINGS, workers=addresses, worker_tls=tls, **settings)


def answers(llm: octavo.LLM) -> list[list[int]]:
    outs = llm.chat(ASKED, PARAMS)
    assert [out.error for out in outs] == [""] * len(outs)
    return [out.outputs[0].token_ids for out in outs]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        return answers(llm)


def listening(host: str) -> set[str]:
    """The ports that are open in a host, but those that one process picked for its collectives."""
    table = subprocess.run(
        ["ip", "netns", "exec", host, "cat", "/proc/net/tcp", "/proc/net/tcp6"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = [line.split() for line in table if line.split()[3] == "0A"]
    return {str(int(fields[1].rpartition(":")[2], 16)) for fields in found}


def test_two_hosts_answer_as_one(
    checkpoint: Path, hosts: list[Kept], certificates: Path, expected: list[list[int]]
) -> None:
    assert [listening(host) for host in HOSTS] == [{"7000"}, {"7000"}]
    with engine(checkpoint, hosts, certificates / "engine") as llm:
        assert answers(llm) == expected
        # The ranks met over the engine's streams: no store listens, only gloo's own socket does.
        assert all(len(listening(host) - {"7000"}) <= 1 for host in HOSTS)


def test_a_stranger_is_not_let_in(
    checkpoint: Path, hosts: list[Kept], certificates: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(join, "JOIN_TIMEOUT", 2.0)
    with pytest.raises(ConfigError, match="requires mutual TLS"):
        engine(checkpoint, hosts, None)
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x -keyout tls.key -out tls.crt"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    shutil.copy(
        certificates / "ca.crt", tmp_path
    )  # it believes the workers; they do not believe it
    with pytest.raises(RuntimeError, match=r"rank 0 .* is not reachable"):
        engine(checkpoint, hosts, tmp_path)
    shutil.copy(tmp_path / "tls.crt", tmp_path / "ca.crt")
    monkeypatch.setattr(join, "JOIN_TIMEOUT", 60.0)  # it may still be starting
    with pytest.raises(ConfigError, match="certificate verification failed"):
        engine(checkpoint, hosts, tmp_path)


def test_a_worker_whose_certificate_names_another_address_is_rejected(
    checkpoint: Path, hosts: list[Kept], certificates: Path, monkeypatch: Any
) -> None:
    ip("-n", HOSTS[0], "addr", "add", "10.98.7.9/24", "dev", "eth0")
    kept = keep(
        checkpoint,
        *("--listen", "10.98.7.9:7000", "--rank", "0", "--tls", str(certificates / "rank0")),
        within=("ip", "netns", "exec", HOSTS[0]),
    )
    kept.read()
    try:
        with pytest.raises(ConfigError, match="certificate verification failed"):
            engine(checkpoint, [kept], certificates / "engine")
    finally:
        assert kept.close() == 0


@pytest.mark.slow
def test_delay_and_loss_change_no_answer(
    checkpoint: Path, hosts: list[Kept], certificates: Path, expected: list[list[int]]
) -> None:
    worse = [
        "tc",
        "qdisc",
        "add",
        "dev",
        "octavo-1",
        "root",
        "netem",
        "delay",
        "3ms",
        "1ms",
        "loss",
        "2%",
    ]
    done = subprocess.run(worse, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this kernel has no netem: {done.stderr.strip()}")
    try:
        with engine(checkpoint, hosts, certificates / "engine") as llm:
            assert answers(llm) == expected
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "octavo-1", "root"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 40])
def test_a_cut_cable(
    checkpoint: Path,
    hosts: list[Kept],
    certificates: Path,
    expected: list[list[int]],
    seconds: int,
) -> None:
    """For less than it takes to notice, and for longer than either end waits."""

    def cut() -> None:
        ip("link", "set", "octavo-1", "down")
        threading.Timer(seconds, ip, ("link", "set", "octavo-1", "up")).start()

    with engine(checkpoint, hosts, certificates / "engine", max_restarts=1) as llm:
        before = llm.engine.worker_pids
        at_steps(llm, {6}, cut)
        began = time.monotonic()
        assert answers(llm) == expected
        assert len(llm.engine.restarts.times) == (1 if seconds > 10 else 0)
        assert (llm.engine.worker_pids == before) == (seconds < 10)
        print(f"cut for {seconds} s, back after {time.monotonic() - began:.0f} s")
        assert answers(llm) == expected


@pytest.mark.slow
def test_a_host_that_is_gone_ends_the_engine_with_its_name(
    checkpoint: Path, hosts: list[Kept], certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "REJOIN_TIMEOUT", 5.0)
    with engine(checkpoint, hosts, certificates / "engine", max_restarts=1) as llm:
        pid = llm.engine.worker_pids[1]
        at_steps(llm, {6}, lambda: (os.kill(pid, signal.SIGKILL), hosts[1].process.kill()))
        with pytest.raises(RuntimeError, match=r"rank 1 \(10.98.7.2:7000\) is not reachable"):
            llm.chat(ASKED, PARAMS)
