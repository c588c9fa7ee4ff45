"""Overhead of the API servers: many concurrent streams from a server whose worker only sleeps.

The engine, the gRPC and HTTP servers and the readers are real processes; the worker's steps take a
set time and compute nothing. Each step samples a different character, so a reader's text identifies
the step of each token; server and readers share the machine's monotonic clock. Only steps in which
all requests decode are counted, without the first and last few.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from rich.table import Table

from ..fakes.tiny_server import READY
from .client import Texts
from .server import LETTERS

KINDS = ("grpc", "http")
EDGE = 10  # steps excluded at each end


@dataclass(frozen=True)
class StreamsReport:
    """Results of a run. CPU times are per step, of one thread each."""

    kind: str
    num_streams: int
    steps: int  # counted steps
    begun_s: float  # seconds until every stream has a token, with the start of readers
    sleep_ms: float  # requested duration of a worker's step
    step_ms: float  # measured step time, from one result to the next
    delay_p50_ms: float  # per token, from the step's result in the engine to the reader
    delay_p99_ms: float
    tokens_per_piece: float  # tokens received together
    step_cpu_ms: float  # CPU time of the step thread
    making_ms: float  # of this: building deltas and text
    handing_ms: float  # of this: delivering them to the server thread
    serving_ms: float  # CPU time of the server thread

    @property
    def tokens_per_s(self) -> float:
        return self.num_streams / self.step_ms * 1e3

    @property
    def of_worker(self) -> float:
        """Throughput as a fraction of the worker's own rate."""
        return self.sleep_ms / self.step_ms

    @property
    def output_share(self) -> float:
        """Fraction of a step that the step thread spends on the streams' output."""
        return (self.making_ms + self.handing_ms) / self.step_ms

    def as_dict(self) -> dict[str, float | str]:
        derived = ("tokens_per_s", "of_worker", "output_share")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def measure(
    kind: str, num_streams: int, sleep_ms: float, seconds: float, num_readers: int = 2
) -> StreamsReport:
    """Measure for `seconds` from when all streams have started, read by `num_readers` processes.

    Raises ValueError for invalid options or if a process fails.
    """
    if num_streams < 1:
        raise ValueError(f"--streams {num_streams}: must be at least 1")
    server = _python("streams.server", str(num_streams), str(sleep_ms))
    try:
        assert server.stdout is not None
        ready = READY.fullmatch(server.stdout.readline())
        if ready is None:
            raise ValueError("the server did not start; see its output above")
        began = time.monotonic()
        address = ready[1] if kind == "grpc" else str(ready[2])
        texts = _read(kind, address, num_streams, seconds, num_readers)
        server.terminate()
        rows = np.array(json.loads(server.stdout.read()))
    finally:
        server.kill()
        server.wait()
    return _report(kind, sleep_ms, began, rows, texts)


def _python(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", f"octavo.benchmarks.{module}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def _read(
    kind: str, address: str, num_streams: int, seconds: float, num_readers: int
) -> list[Texts]:
    """Read all streams. Raises ValueError if a reader fails."""
    bounds = [num_streams * i // num_readers for i in range(num_readers + 1)]
    readers = [
        _python("streams.client", kind, address, str(low), str(high - low))
        for low, high in pairwise(bounds)
        if low < high
    ]
    try:
        started = [reader.stdout.readline() for reader in readers if reader.stdout]
        if not all(started):
            raise ValueError("a reader failed; see its output above")
        time.sleep(seconds)
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
        outputs = [reader.communicate()[0] for reader in readers]
        return [texts for output in outputs for texts in json.loads(output)]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def _report(
    kind: str, sleep_ms: float, began: float, rows: np.ndarray, texts: list[Texts]
) -> StreamsReport:
    placed = [place(each, rows[:, 0]) for each in texts]
    first = max(steps[0] for steps, _ in placed) + EDGE
    last = min(steps[-1] for steps, _ in placed) - EDGE
    if last <= first:
        raise ValueError("--seconds: too short; no step had all streams; pass a larger value")
    moments, making, handing = rows[:, 0], rows[:, 2], rows[:, 3]
    delays, pieces = [], 0
    for steps, came in placed:
        counted = (steps >= first) & (steps < last)
        delays.append(came[counted] - moments[steps[counted]])
        pieces += len(np.unique(came[counted]))
    p50, p99 = np.percentile(np.concatenate(delays), [50, 99])

    def each(sums: np.ndarray) -> float:
        return float(sums[last] - sums[first]) / (last - first) * 1e3

    return StreamsReport(
        kind,
        len(texts),
        int(last - first),
        float(max(came[0] for _, came in placed)) - began,
        sleep_ms,
        each(moments),
        float(p50) * 1e3,
        float(p99) * 1e3,
        sum(map(len, delays)) / pieces,
        each(rows[:, 1]),
        each(making),
        each(handing),
        each(rows[:, 4]),
    )


def place(texts: Texts, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the step number and the arrival time of each token of a stream.

    A stream has a token of every step from its first step on. The first step is the latest one
    that matches the first character and precedes all arrivals. Raises ValueError if none does.
    """
    text = "".join(piece for _, piece in texts)
    came = np.repeat([at for at, _ in texts], [len(piece) for _, piece in texts])
    letters = np.array([LETTERS.index(letter) for letter in text])
    steps = np.arange(len(text)) + letters[:1]
    if not len(text) or (letters != steps % len(LETTERS)).any():
        raise ValueError("a stream's text is not one character per step")
    while steps[-1] + len(LETTERS) < len(moments):
        if (moments[steps + len(LETTERS)] > came).any():
            break
        steps = steps + len(LETTERS)
    if (moments[steps] > came).any():
        raise ValueError("a stream's text arrived before its steps")
    return steps, came


def table(reports: Sequence[StreamsReport]) -> Table:
    shown = Table(title="Sleeping worker; CPU times are per thread and step")
    shown.add_column("")
    for r in reports:
        shown.add_column(f"{r.kind}, {r.num_streams} streams, {r.sleep_ms:g} ms", justify="right")
    rows: dict[str, Callable[[StreamsReport], str]] = {
        "all streams started after, s": lambda r: f"{r.begun_s:.1f}",
        "step, ms": lambda r: f"{r.step_ms:.2f}",
        "tokens/s": lambda r: f"{r.tokens_per_s:,.0f}",
        "of the worker's rate": lambda r: f"{r.of_worker:.1%}",
        "delay p50, ms": lambda r: f"{r.delay_p50_ms:.1f}",
        "delay p99, ms": lambda r: f"{r.delay_p99_ms:.1f}",
        "tokens per received piece": lambda r: f"{r.tokens_per_piece:.2f}",
        "CPU of step thread, ms": lambda r: f"{r.step_cpu_ms:.2f}",
        "of this, building deltas, ms": lambda r: f"{r.making_ms:.3f}",
        "of this, delivering, ms": lambda r: f"{r.handing_ms:.3f}",
        "these two / step time": lambda r: f"{r.output_share:.1%}",
        "CPU of server thread, ms": lambda r: f"{r.serving_ms:.2f}",
    }
    for name, text_of in rows.items():
        shown.add_row(name, *(text_of(r) for r in reports))
    return shown
