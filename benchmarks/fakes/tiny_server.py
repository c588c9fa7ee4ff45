"""Servers for tests: `octavo serve` as a subprocess, and a gRPC server in the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.server.grpc_api.server import SERVING, listen, make_server
from octavo.engine.utils.tls import TlsFiles

SETTINGS = ("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "4000000")
READY = re.compile(
    r"ready grpc=(127\.0\.0\.1:\d+)(?: http=(127\.0\.0\.1:\d+))? pid=(\d+) worker_pids=([\d,]+)"
    r"(?: metrics=(\S+))?\n"
)


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    worker_pids: list[int]
    log: Any
    http_address: str | None = None
    metrics: str = ""  # HOST:PORT, if enabled

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def text(self) -> str:
        """Return the log so far."""
        self.log.seek(0)
        return self.log.read()


def start(model: Path, *options: str) -> Server:
    """Start a server of `model` on a free port and wait until it is ready."""
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--model", str(model)]
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
    assert int(match[3]) == process.pid
    pids = [int(pid) for pid in match[4].split(",")]
    return Server(process, match[1], pids, log, match[2], match[5] or "")


class Served:
    """An AsyncLLM with its gRPC services in this process, so that tests can access both."""

    def __init__(self, checkpoint: Path, **settings: Any) -> None:
        self.engine = AsyncLLM(checkpoint, **settings)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(30)

    async def _start(self) -> None:
        self.server, self.address = await self._listen(None, None)

    async def _listen(
        self, keys: ApiKeys | None, tls: TlsFiles | None
    ) -> tuple[grpc.aio.Server, str]:
        made = make_server(self.engine, keys)
        port = listen(made.server, "127.0.0.1:0", tls)
        await made.set_health(SERVING)
        await made.server.start()
        return made.server, f"127.0.0.1:{port}"

    @contextlib.contextmanager
    def another(self, keys: ApiKeys | None = None, tls: TlsFiles | None = None) -> Iterator[str]:
        """Yield the address of a second server of the same engine."""
        server, address = self.run(self._listen(keys, tls))
        yield address
        self.run(server.stop(None))

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def wait_empty(self) -> None:
        deadline = time.monotonic() + 10
        while self.engine.engine.has_requests or self.engine._streams:
            assert time.monotonic() < deadline, "a request is still active"
            time.sleep(0.01)
        self.engine.engine.scheduler.check_integrity()

    def close(self) -> None:
        self.run(self.server.stop(None))
        self.engine.close()
        self.loop.call_soon_threadsafe(self.loop.stop)


def alive(pid: int) -> bool:
    """Return whether a process is running (zombies are not)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until `condition` holds. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)
