"""What the doors add: many streams at once from a server whose worker only sleeps.

The engine, gRPC, HTTP and the readers are real processes; the worker takes a set time a step and
computes nothing. Each step draws a character of its own, so a reader's text says which step a piece
of it is of; server and readers share the machine's monotonic clock. Only steps in which all
requests decode are counted, without the first and last few.
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
EDGE = 10  # steps at each end that are not counted


@dataclass(frozen=True)
class StreamsReport:
    """Milliseconds, where nothing else is said. CPU times are per step, of one thread each."""

    kind: str
    num_streams: int
    steps: int  # that were counted
    begun_s: float  # seconds until all streams had their first token, readers' start included
    sleep_ms: float  # what a worker's step is asked to take
    step_ms: float  # what it took, from one result to the next
    delay_p50_ms: float  # of each token, from its step's result in the engine to its reader
    delay_p99_ms: float
    tokens_per_piece: float  # that came together
    step_cpu_ms: float  # the thread that steps: all it does
    making_ms: float  # of this: tokens made text and deltas
    handing_ms: float  # of this: handed to the thread that serves
    serving_ms: float  # the thread that serves

    @property
    def tokens_per_s(self) -> float:
        return self.num_streams / self.step_ms * 1e3

    @property
    def of_worker(self) -> float:
        """Of the tokens that the worker alone would give."""
        return self.sleep_ms / self.step_ms

    @property
    def output_share(self) -> float:
        """Of a step's time, what the thread that steps spends on the streams' output."""
        return (self.making_ms + self.handing_ms) / self.step_ms

    def as_dict(self) -> dict[str, float | str]:
        derived = ("tokens_per_s", "of_worker", "output_share")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def measure(
    kind: str, num_streams: int, sleep_ms: float, seconds: float, num_readers: int = 2
) -> StreamsReport:
    """For so many seconds from when all streams have begun. `num_readers`: processes that share
    the streams. Raises ValueError."""
    if num_streams < 1:
        raise ValueError(f"--streams {num_streams}: must be at least 1")
    server = _python("streams_server", str(num_streams), str(sleep_ms))
    try:
        assert server.stdout is not None
        ready = READY.fullmatch(server.stdout.readline())
        if ready is None:
            raise ValueError("the server did not start; its last words are above")
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
    """Raises ValueError when a reader fails."""
    bounds = [num_streams * i // num_readers for i in range(num_readers + 1)]
    readers = [
        _python("streams_client", kind, address, str(low), str(high - low))
        for low, high in pairwise(bounds)
        if low < high
    ]
    try:
        begun = [reader.stdout.readline() for reader in readers if reader.stdout]
        if not all(begun):
            raise ValueError("a reader failed; its last words are above")
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
        raise ValueError("--seconds: too few; no step was one of all streams")
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
    """Of each token of a stream: the number of its step, and when it came. A stream has a token of
    every step from its first on; that is the latest that its first character allows and before
    which nothing came. Raises ValueError where this cannot be."""
    text = "".join(piece for _, piece in texts)
    came = np.repeat([at for at, _ in texts], [len(piece) for _, piece in texts])
    letters = np.array([LETTERS.index(letter) for letter in text])
    steps = np.arange(len(text)) + letters[:1]
    if not len(text) or (letters != steps % len(LETTERS)).any():
        raise ValueError("a stream's text is not one character a step")
    while steps[-1] + len(LETTERS) < len(moments):
        if (moments[steps + len(LETTERS)] > came).any():
            break
        steps = steps + len(LETTERS)
    if (moments[steps] > came).any():
        raise ValueError("a stream's text came before its steps")
    return steps, came


def table(reports: Sequence[StreamsReport]) -> Table:
    shown = Table(title="a worker that sleeps; CPU is a thread's, a step")
    shown.add_column("")
    for r in reports:
        shown.add_column(f"{r.kind}, {r.num_streams} streams, {r.sleep_ms:g} ms", justify="right")
    rows: dict[str, Callable[[StreamsReport], str]] = {
        "all had begun after, s": lambda r: f"{r.begun_s:.1f}",
        "step, ms": lambda r: f"{r.step_ms:.2f}",
        "tokens a second": lambda r: f"{r.tokens_per_s:,.0f}",
        "of the worker's alone": lambda r: f"{r.of_worker:.1%}",
        "delay p50, ms": lambda r: f"{r.delay_p50_ms:.1f}",
        "delay p99, ms": lambda r: f"{r.delay_p99_ms:.1f}",
        "tokens that came at once": lambda r: f"{r.tokens_per_piece:.2f}",
        "CPU of stepping, ms": lambda r: f"{r.step_cpu_ms:.2f}",
        "of it making deltas, ms": lambda r: f"{r.making_ms:.3f}",
        "of it handing them over, ms": lambda r: f"{r.handing_ms:.3f}",
        "these two, of a step": lambda r: f"{r.output_share:.1%}",
        "CPU of serving, ms": lambda r: f"{r.serving_ms:.2f}",
    }
    for name, tell in rows.items():
        shown.add_row(name, *(tell(r) for r in reports))
    return shown
