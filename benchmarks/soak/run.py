"""The soak: a server, client processes, and samples of the server's resources."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ...engine.utils.lifetime import start_tied
from .caller import Caller, FirstAnswers
from .clients import Settings
from .good import ask, chat, image_part
from .media import SIZES, MediaSet, draw_image
from .report import SoakReport
from .samples import Sample, read_metrics, take_sample

API_KEY = "a-key-of-the-soak"
READY = re.compile(r"ready grpc=(\S+) http=(\S+) pid=(\d+) ")
SERVER_TIMEOUT = 60.0  # seconds from SIGTERM until the server is killed
SETTLE_TIMEOUT = 60.0  # seconds to wait for requests in flight
SETTLE_TIME = 3.0  # idle seconds before a census
# Small enough that the whole KV cache is in use before the measured window.
KV_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class SoakOptions:
    minutes: float = 60.0
    warm_up: float = 20.0  # minutes excluded from the slope
    settled: float = 10.0  # time of the first census, in minutes
    rate: float = 8.0  # cases per second, over all processes
    num_processes: int = 2
    num_threads: int = 6  # threads per process
    sample_interval: float = 5.0  # seconds
    census_interval: float = 0.0  # minutes between further censuses; 0: none
    num_first_images: int = 180  # sent first, to fill the bounded encoder cache
    seed: int = 0
    cases: tuple[str, ...] = ()  # by name; empty: all
    serve_arguments: tuple[str, ...] = ()
    log_file: Path | None = None


@dataclass
class ClientProcess:
    """A client process and the last line it printed."""

    process: subprocess.Popen[Any]
    last: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, settings: Settings) -> ClientProcess:
        command = [sys.executable, "-P", "-m", "octavo.benchmarks.soak.clients"]
        process = subprocess.Popen(
            [*command, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started = cls(process)
        threading.Thread(target=started._read, daemon=True).start()
        return started

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last = json.loads(line)

    def send(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def close(self) -> None:
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(SERVER_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class ServerUnderTest:
    """An `octavo serve` process with both APIs."""

    process: subprocess.Popen[Any]
    grpc_address: str
    http_address: str


@contextlib.contextmanager
def serving(arguments: tuple[str, ...], folder: Path, log: IO[str]) -> Iterator[ServerUnderTest]:
    """Start the server; on exit, stop it with SIGTERM."""
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve"]
    command += ["--port", "0", "--http-port", "0", "--allow-media-path", str(folder)]
    command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), *arguments]
    env = {**os.environ, "OCTAVO_API_KEYS": API_KEY}
    # A killed soak closes the pipe on standard input, and the kernel then ends the server.
    process = start_tied(
        command, signal.SIGKILL, stdout=subprocess.PIPE, stderr=log, text=True, env=env
    )
    try:
        assert process.stdout is not None
        line = str(process.stdout.readline())
        match = READY.match(line)
        if match is None:
            raise RuntimeError(f"the server did not start: {line!r}")
        yield ServerUnderTest(process, match[1], match[2])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SERVER_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Soak:
    """One soak run."""

    def __init__(self, options: SoakOptions, on_minute: Callable[[str], None]) -> None:
        self._options, self._on_minute = options, on_minute
        self._samples: list[Sample] = []
        self._censuses: list[Sample] = []

    def run(self) -> SoakReport:
        """Run the soak. Raises RuntimeError if the server does not start or exits."""
        options = self._options
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
            if options.log_file is not None:
                log: IO[str] = stack.enter_context(options.log_file.open("w"))
            else:
                log = stack.enter_context(tempfile.TemporaryFile("w+"))
            server = stack.enter_context(serving(options.serve_arguments, folder, log))
            self._server = server
            self._fill_encoder_cache(folder)
            self._began = time.monotonic()
            self._clients = [self._start_clients(n, folder) for n in range(options.num_processes)]
            for client in self._clients:
                stack.callback(client.close)
            self._watch()
            for client in self._clients:
                client.close()
            exit_code = server.process.poll()
        counts, failures = self._seen()
        judged = (60 * options.warm_up, 60 * options.minutes)
        return SoakReport(
            tuple(self._samples), tuple(self._censuses), counts, failures, judged, exit_code
        )

    def _fill_encoder_cache(self, folder: Path) -> None:
        """Send large new images, so that the cache does not grow in the measured window."""
        server, rng = self._server, random.Random(self._options.seed)
        addresses = (server.grpc_address, server.http_address, API_KEY)
        caller = Caller(*addresses, MediaSet((), (), folder), FirstAnswers(), rng)
        for _ in range(self._options.num_first_images):
            url = draw_image(rng, SIZES[-1]).data_uri
            chat(caller, ask("Which shape is it?", image_part(url)), max_tokens=1)
        caller.close()

    def _start_clients(self, number: int, folder: Path) -> ClientProcess:
        options, server = self._options, self._server
        settings = Settings(
            server.grpc_address,
            server.http_address,
            API_KEY,
            str(folder),
            1000 * options.seed + number,
            options.rate / options.num_processes,
            options.num_threads,
            options.cases,
        )
        return ClientProcess.start(settings)

    def _watch(self) -> None:
        """Sample until the end, with a census once settled and at the end."""
        options = self._options
        end = 60 * options.minutes
        censuses = self._census_times()
        next_line = 60.0
        while (now := time.monotonic() - self._began) < end:
            if censuses and now >= censuses[0]:
                censuses.pop(0)
                self._take_census()
            self._samples.append(self._sample())
            if now >= next_line:
                next_line += 60
                self._on_minute(self._line())
            time.sleep(options.sample_interval)
        self._take_census()
        self._on_minute(self._line())

    def _census_times(self) -> list[float]:
        options = self._options
        times = {60 * min(options.settled, options.minutes / 2)}
        if options.census_interval:
            count = int(options.minutes / options.census_interval)
            times |= {60 * options.census_interval * n for n in range(1, count)}
        return sorted(times)

    def _sample(self) -> Sample:
        process = self._server.process
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with status {process.returncode}")
        try:
            metrics = read_metrics(self._server.http_address, API_KEY)
        except OSError:
            metrics = {}
        return take_sample(process.pid, self._began, metrics)

    def _take_census(self) -> None:
        """Pause the clients and sample the idle server."""
        for client in self._clients:
            client.send("pause")
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while time.monotonic() < deadline and not all(map(_is_idle, self._clients)):
            time.sleep(0.2)
        time.sleep(SETTLE_TIME)
        counts, _ = self._seen()
        number = sum(n for name, n in counts.items() if " " not in name)
        self._censuses.append(replace(self._sample(), num_cases=number))
        for client in self._clients:
            client.send("go")

    def _seen(self) -> tuple[Counter[str], list[str]]:
        counts: Counter[str] = Counter()
        failures: list[str] = []
        for client in self._clients:
            counts.update(client.last.get("counts", {}))
            failures += client.last.get("failures", [])
        return counts, failures

    def _line(self) -> str:
        last, (counts, failures) = self._samples[-1], self._seen()
        parts = [f"{last.at / 60:5.1f} min"]
        for role in last.roles:
            parts.append(f"{last.count(role)} {role} {last.resident(role) / 1e6:.1f} MB")
        parts.append(f"{sum(n for name, n in counts.items() if ' ' not in name)} cases")
        parts.append(f"{len(failures)} failures")
        return ", ".join(parts)


def _is_idle(client: ClientProcess) -> bool:
    return bool(client.last.get("is_paused")) and not client.last.get("num_active")
