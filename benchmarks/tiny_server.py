"""`octavo serve` as a process of its own, for tests of what users meet."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = ("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "4000000")
READY = re.compile(r"ready grpc=(127\.0\.0\.1:\d+) pid=(\d+) worker_pids=([\d,]+)\n")


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    worker_pids: list[int]
    log: Any

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def text(self) -> str:
        """Its log so far."""
        self.log.seek(0)
        return self.log.read()


def start(model: Path, *options: str) -> Server:
    """A server of `model` that is ready, on a free port."""
    command = [sys.executable, "-P", "-m", "octavo.engine.cli", "serve", "--model", str(model)]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [*command, "--port", "0", *SETTINGS, *options],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    match = READY.fullmatch(line)
    assert match, (line, log.seek(0), log.read())
    assert int(match[2]) == process.pid
    return Server(process, match[1], [int(pid) for pid in match[3].split(",")], log)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Raises AssertionError when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
