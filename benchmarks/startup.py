"""Startup time of `octavo serve` as a subprocess, by phase.

The phases are observed from outside, so the measurement matches what a user starts:

    imports         until the engine process has started a worker
    worker starts   until the first worker listens
    load            until the engine logs its KV cache size: the worker has imported torch, read
                    the weights and allocated the KV cache
    ready           until the ready line: a first step, and the server's port
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .process_memory import anonymous_bytes, shared_bytes, tree

PHASES = ("imports", "worker starts", "load", "ready")
READY = re.compile(r"ready grpc=(\S+) .*pid=\d+")
CAPACITY = "KV blocks of"  # in the log line that the engine writes after allocating the KV cache
POLL_INTERVAL = 0.01  # seconds between two polls of the server's processes


class ServerProcess:
    """A server that is ready, as a context manager."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start a server on a free port; `arguments` are those of `octavo serve`.

        Raises ValueError with its last log line if it exits before it is ready.
        """
        command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--port", "0"]
        self._began = time.perf_counter()
        self._marks: dict[str, float] = {}
        self._log: list[str] = []
        self._process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        reading = threading.Thread(target=self._read_log, name="log", daemon=True)
        reading.start()
        threading.Thread(target=self._look, name="look", daemon=True).start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self._mark("ready")
        match = READY.match(line)
        if match is None:
            self._process.wait()
            reading.join(5)
            raise ValueError(
                self._log[-1].removeprefix("octavo: ") if self._log else "no ready line"
            )
        self.address = match[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def memory_bytes(self) -> int:
        """Anonymous and shared memory of all the server's processes."""
        return anonymous_bytes(self.pid) + shared_bytes(self.pid)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each observed phase; an unobserved one is counted in the next."""
        found, before = {}, 0.0
        for name in PHASES:
            if name in self._marks:
                found[name] = self._marks[name] - before
                before = self._marks[name]
        return found

    @property
    def seconds(self) -> float:
        return self._marks["ready"]

    def _mark(self, name: str) -> None:
        self._marks.setdefault(name, time.perf_counter() - self._began)

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if CAPACITY in line:
                self._mark("load")
            self._log.append(line.strip())

    def _look(self) -> None:
        """Poll until a worker listens."""
        socket: Path | None = None
        while "ready" not in self._marks:
            if socket is None:
                socket = _worker_socket(self.pid)
                if socket is not None:
                    self._mark("imports")
            if socket is not None and socket.exists():
                self._mark("worker starts")
                return
            time.sleep(POLL_INTERVAL)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _worker_socket(pid: int) -> Path | None:
    """Return the socket path of the server's first worker; None before it has started."""
    for child in tree(pid)[1:]:
        try:
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if "--socket" in words:
            return Path(words[words.index("--socket") + 1])
    return None


def serve_arguments(settings: dict[str, Any]) -> list[str]:
    """Convert engine settings to arguments of `octavo serve`; None is omitted."""
    words: list[str] = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if value is False:
            words.append(option.replace("--", "--no-", 1))
        elif value is True:
            words.append(option)
        elif value is not None:
            words += [option, str(value)]
    return words


def measure(settings: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Start the server `rounds` times; return seconds, phases and memory of each start."""
    found = []
    for _ in range(rounds):
        with ServerProcess(serve_arguments(settings)) as server:
            found.append(
                {
                    "seconds": server.seconds,
                    "phases": server.phases,
                    "memory_bytes": server.memory_bytes,
                }
            )
    return found


def table(starts: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one row per start."""
    found = Table(title="seconds from process start to the ready line")
    names = [name for name in PHASES if any(name in start["phases"] for start in starts)]
    for column in ("start", *names, "total", "GB"):
        found.add_column(column, justify="right")
    for number, start in enumerate(starts, 1):
        phases = [f"{start['phases'].get(name, 0.0):.2f}" for name in names]
        memory = f"{start['memory_bytes'] / 1e9:.2f}"
        found.add_row(str(number), *phases, f"{start['seconds']:.2f}", memory)
    return found
