"""Open-loop load on a server: requests arrive on schedule, whether or not it keeps up.

Arrivals are a Poisson process: gaps are sampled from an exponential distribution of mean 1 / rate.
Arrivals do not wait for answers, and latency counts from the scheduled arrival, so a stalled server
is charged for all requests that arrive meanwhile (this avoids coordinated omission). Only later
turns of a conversation wait: each is scheduled when the previous turn has been answered.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table

from octavo.engine.client.client import Client, ClientError
from octavo.engine.config.hub import resolve_model

from .compare.engines import RequestTimes
from .options import WorkloadOptions
from .progress import request_bar
from .report import Report, latency_table, sweep_table, tpot, ttft
from .request_file import png
from .startup import ServerProcess, serve_arguments
from .throughput import WARM_UP
from .workload import BenchRequest

# Stream of one request: (number of new tokens, prompt tokens or None) per delta.
Answer = Iterator[tuple[int, int | None]]


@dataclass(frozen=True)
class Bounds:
    """Goodput bounds in milliseconds; None means unbounded."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def are_kept(self, seen: RequestTimes) -> bool:
        if seen.error or not seen.times:
            return False
        first, later = ttft(seen) * 1e3, tpot(seen) * 1e3
        return (self.ttft_ms is None or first <= self.ttft_ms) and (
            self.tpot_ms is None or later <= self.tpot_ms
        )

    def __bool__(self) -> bool:
        return self != Bounds()


@dataclass(frozen=True)
class LoadPoint:
    """Results of one request rate."""

    request_rate: float  # requested, in requests/s; inf: all at once
    offered_rate: float  # rate of the sampled arrivals, in requests/s
    bounds: Bounds
    goodput: float | None  # requests/s within the bounds; None without bounds
    good_share: float | None
    report: Report

    @classmethod
    def of(cls, rate: float, bounds: Bounds, seen: Sequence[RequestTimes]) -> LoadPoint:
        report = Report.of(seen)
        good = sum(map(bounds.are_kept, seen))
        offered = offered_rate([each.due for each in seen])
        if not bounds:
            return cls(rate, offered, bounds, None, None, report)
        return cls(rate, offered, bounds, good / report.seconds, good / len(seen), report)

    def as_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = {"request_rate": self.request_rate, "offered_rate": self.offered_rate}
        own["bounds"] = asdict(self.bounds)
        return {**own, "goodput": self.goodput, "good_share": self.good_share} | (
            self.report.as_dict()
        )


def offered_rate(due: Sequence[float]) -> float:
    """Return the requests per second between the first and last arrival; inf: all at once."""
    span = max(due) - min(due)
    return (len(due) - 1) / span if span else float("inf")


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Sample arrival times in seconds; the first is 0. An infinite rate sends all at once."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(0, count - 1))
    return [0.0, *np.cumsum(gaps).tolist()][:count]


class Load:
    """Requests in flight to one server."""

    def __init__(
        self,
        send: Callable[[BenchRequest], Answer],
        requests: Sequence[BenchRequest],
        max_concurrency: int | None,
        on_tokens: Callable[[int, int], None] = lambda tokens, ended: None,
    ) -> None:
        """Create a load; `send` streams one request's answer and may raise ClientError."""
        self._send, self._requests, self._on_tokens = send, requests, on_tokens
        self._seen = [RequestTimes(len(request.prompt_token_ids)) for request in requests]
        self._pool = ThreadPoolExecutor(max_concurrency or max(1, len(requests)))
        self._ended = threading.Semaphore(0)
        self._faults: list[BaseException] = []

    def run(self, due: Sequence[float]) -> list[RequestTimes]:
        """Send all requests and wait for them.

        `due` has the arrival times of the requests without `after`, in order; the others are sent
        when the request they follow has finished.
        """
        self._began = time.perf_counter()
        first = [i for i, request in enumerate(self._requests) if request.after is None]
        with self._pool:
            for index, at in zip(first, due, strict=True):
                time.sleep(max(0.0, at - self._now()))
                self._submit(index, at)
            for _ in self._requests:
                self._ended.acquire()
        if self._faults:
            raise self._faults[0]
        return self._seen

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _submit(self, index: int, due: float) -> None:
        self._seen[index].due = due
        self._pool.submit(self._ask, index)

    def _ask(self, index: int) -> None:
        """Run one request to its end, on a pool thread."""
        seen = self._seen[index]
        try:
            for count, prompt_tokens in self._send(self._requests[index]):
                if count:
                    seen.times.append(self._now())
                    seen.output_tokens += count
                    self._on_tokens(count, 0)
                seen.prompt_tokens = prompt_tokens or seen.prompt_tokens
            if not seen.times:
                seen.error = "no token was received"
        except ClientError as error:
            seen.error = str(error)
        except BaseException as error:
            self._faults.append(error)
            seen.error = str(error)
        self._on_tokens(0, 1)
        for later, request in enumerate(self._requests):
            if request.after == index:
                self._submit(later, self._now())
        self._ended.release()


def sender(client: Client) -> Callable[[BenchRequest], Answer]:
    """Return a function that sends over gRPC. `pack` encodes media beforehand."""

    def send(request: BenchRequest) -> Answer:
        deltas = client.generate(
            request.prompt_token_ids,
            images=request.images,
            videos=request.videos,
            temperature=0,
            max_tokens=request.max_tokens,
            ignore_eos=True,
        )
        for delta in deltas:
            yield len(delta.token_ids), delta.usage.prompt_tokens if delta.usage else None

    return send


def pack(requests: Sequence[BenchRequest]) -> list[BenchRequest]:
    """Encode the requests' images as PNG before measuring; a shared image is encoded once."""
    packed: dict[int, Any] = {}
    for request in requests:
        for image in (*request.images, *(frame for video in request.videos for frame in video)):
            if id(image) not in packed:
                packed[id(image)] = png(image)
    return [
        replace(
            request,
            images=tuple(packed[id(image)] for image in request.images),
            videos=tuple(tuple(packed[id(each)] for each in video) for video in request.videos),
        )
        for request in requests
    ]


def measure(
    options: WorkloadOptions,
    settings: dict[str, Any],
    server: str | None,
    rates: Sequence[float],
    num_prompts: int,
    max_concurrency: int | None,
    bounds: Bounds,
) -> list[tuple[LoadPoint, list[RequestTimes]]]:
    """Run each rate on the server at `server`, or on one started for the purpose.

    Raises ValueError for invalid options and ClientError if the warm-up fails.
    """
    model_dir = resolve_model(settings["model"], settings["hub"])
    # Make a request before starting a server, to report invalid options and files at once.
    warm_up = replace(options.make(model_dir, 1, WARM_UP)[0], max_tokens=2)
    found = []
    with contextlib.ExitStack() as stack:
        if server is None:
            server = stack.enter_context(ServerProcess(serve_arguments(settings))).address
        client = stack.enter_context(Client(server))
        for _ in sender(client)(pack([warm_up])[0]):
            pass
        for number, rate in enumerate(rates):
            requests = pack(options.make(model_dir, num_prompts, number))
            due = arrivals(rate, sum(each.after is None for each in requests), options.seed)
            title = f"{rate:g} requests/s"
            with request_bar(title, len(requests)) as on_tokens:
                seen = Load(sender(client), requests, max_concurrency, on_tokens).run(due)
            found.append((LoadPoint.of(rate, bounds, seen), seen))
    return found


def load_tables(points: Sequence[LoadPoint]) -> list[Table]:
    """Return tables of the rates; for a single rate, also of its latencies."""
    more: dict[str, list[str]] = {}
    if points[0].bounds:
        more["good req/s"] = [f"{point.goodput:.2f}" for point in points]
        more["good"] = [f"{point.good_share:.0%}" for point in points]
    named = {f"{point.request_rate:g}": point.report for point in points}
    tables = [_rate_table(points), sweep_table(named, "rate", **more)]
    if len(points) == 1:
        tables.insert(0, latency_table(points[0].report, "latency from the scheduled arrival"))
    return tables


def _rate_table(points: Sequence[LoadPoint]) -> Table:
    table = Table(title="Requests per second", title_justify="left")
    for column in ("requested", "offered", "completed"):
        table.add_column(column, justify="right")
    for point in points:
        rates = (point.offered_rate, point.report.requests_per_second)
        table.add_row(f"{point.request_rate:g}", *(f"{rate:.2f}" for rate in rates))
    return table
