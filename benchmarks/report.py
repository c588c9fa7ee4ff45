"""Summary of a run: rates and latency percentiles, as tables and as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .compare.engines import RequestTimes

PERCENTILES = (50, 90, 99)


def ttft(seen: RequestTimes) -> float:
    """Return the seconds from the request's scheduled arrival to its first token."""
    return seen.times[0] - seen.due


def tpot(seen: RequestTimes) -> float:
    """Return the mean seconds per token after the first."""
    return (seen.times[-1] - seen.times[0]) / max(1, seen.output_tokens - 1)


def itl(seen: RequestTimes) -> list[float]:
    """Return the seconds from each batch of new tokens to the next."""
    return np.diff(seen.times).tolist()


@dataclass(frozen=True)
class Latency:
    """Mean and percentiles of a latency, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency:
        """Summarize `values`; NaN if there are none."""
        if not values:
            return cls(*[float("nan")] * 4)
        return cls(float(np.mean(values)), *map(float, np.percentile(values, PERCENTILES)))


@dataclass(frozen=True)
class Report:
    """Figures of a run. Latencies count from a request's scheduled arrival."""

    num_requests: int  # successful requests
    failed: int
    prompt_tokens: int
    output_tokens: int
    seconds: float  # from the first scheduled arrival to the last token
    prefill_seconds: float  # to the last request's first token
    ttft: Latency
    tpot: Latency
    itl: Latency
    e2e: Latency  # to the last token

    @classmethod
    def of(cls, seen: Sequence[RequestTimes]) -> Report:
        """Summarize a run. Raises ValueError with the first error if every request failed."""
        done = [each for each in seen if not each.error]
        if not done:
            raise ValueError(f"all requests failed: {seen[0].error}")
        return cls(
            num_requests=len(done),
            failed=len(seen) - len(done),
            prompt_tokens=sum(each.prompt_tokens for each in done),
            output_tokens=sum(each.output_tokens for each in done),
            seconds=max(each.times[-1] for each in done),
            prefill_seconds=max(each.times[0] for each in done),
            ttft=Latency.of([ttft(each) for each in done]),
            tpot=Latency.of([tpot(each) for each in done if each.output_tokens > 1]),
            itl=Latency.of([gap for each in done for gap in itl(each)]),
            e2e=Latency.of([each.times[-1] - each.due for each in done]),
        )

    @property
    def requests_per_second(self) -> float:
        return self.num_requests / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """All prompt tokens, over the time to the last request's first token."""
        return self.prompt_tokens / self.prefill_seconds

    def as_dict(self) -> dict[str, Any]:
        rates = ("requests", "output_tokens", "total_tokens", "prefill_tokens")
        per_second = {f"{name}_per_second": getattr(self, f"{name}_per_second") for name in rates}
        return asdict(self) | per_second


def machine() -> dict[str, Any]:
    """Return the hardware, versions and command, needed to interpret the figures."""
    names = ("torch", "triton", "transformers")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "command": " ".join(sys.argv),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write JSON to a file, or to stdout if the path is "-". Replaces NaN with null."""
    text = json.dumps(_finite(found), indent=1)
    if str(path) == "-":
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def latency_table(report: Report, title: str) -> Table:
    """Return a table with one row per latency, in milliseconds."""
    table = Table(title=title, title_justify="left", caption=rates_line(report))
    table.add_column("milliseconds")
    for column in ("mean", *(f"p{number}" for number in PERCENTILES)):
        table.add_column(column, justify="right")
    rows = {
        "time to first token (TTFT)": report.ttft,
        "time per output token (TPOT)": report.tpot,
        "inter-token latency (ITL)": report.itl,
        "end-to-end latency": report.e2e,
    }
    for name, latency in rows.items():
        values = (latency.mean, latency.p50, latency.p90, latency.p99)
        table.add_row(name, *(f"{value * 1e3:,.1f}" for value in values))
    return table


def rates_line(report: Report) -> str:
    failed = f", {report.failed} failed" if report.failed else ""
    return (
        f"{report.num_requests} requests{failed}, {report.prompt_tokens:,} tokens in, "
        f"{report.output_tokens:,} out, {report.seconds:.2f} s: "
        f"{report.requests_per_second:.2f} req/s, {report.output_tokens_per_second:.1f} tok/s out, "
        f"{report.total_tokens_per_second:.1f} total"
    )


def sweep_table(reports: Mapping[str, Report], heading: str, **more: Sequence[str]) -> Table:
    """Return a table with one row per run; `more` columns follow the common ones."""
    table = Table(title="TTFT and TPOT in milliseconds", title_justify="left")
    columns = ["req/s", "tok/s out", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99"]
    for column in (heading, *columns, *more):
        table.add_column(column, justify="right")
    for (name, report), *extra in zip(reports.items(), *more.values(), strict=True):
        latencies = [
            getattr(latency, f"p{number}")
            for latency in (report.ttft, report.tpot)
            for number in PERCENTILES
        ]
        table.add_row(
            name,
            f"{report.requests_per_second:.2f}",
            f"{report.output_tokens_per_second:.1f}",
            *(f"{value * 1e3:,.1f}" for value in latencies),
            *extra,
        )
    return table


def publish(
    tables: Sequence[Table],
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    path: Path | None,
) -> None:
    """Print the tables (to stderr if the JSON goes to stdout) and write the JSON."""
    console = Console(stderr=str(path) == "-")
    for table in tables:
        console.print(table)
    if path is not None:
        given = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
        write_json(path, {"machine": machine(), "settings": given, **found})
