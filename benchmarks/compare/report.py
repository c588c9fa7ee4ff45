"""Results of an engine comparison: figures per round, ratios per pair, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..report import machine, tpot, write_json
from .engines import RequestTimes


@dataclass(frozen=True)
class Round:
    """Figures of one engine's run of the workload."""

    num_requests: int
    output_tokens: int
    seconds: float  # from submission to the last token
    prefill_seconds: float  # to the last request's first token
    tpot_seconds: float  # median over requests
    memory_bytes: int  # peak anonymous plus shared memory of the engine's processes

    @classmethod
    def of(cls, times: Sequence[RequestTimes], memory_bytes: int) -> Round:
        return cls(
            num_requests=len(times),
            output_tokens=sum(seen.output_tokens for seen in times),
            seconds=max(seen.times[-1] for seen in times),
            prefill_seconds=max(seen.times[0] for seen in times),
            tpot_seconds=statistics.median(map(tpot, times)),
            memory_bytes=memory_bytes,
        )

    def as_text(self) -> str:
        return (
            f"{self.output_tokens / self.seconds:.1f} tok/s, all prefilled after "
            f"{self.prefill_seconds:.2f} s, all done after {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def as_text(self, template: str) -> str:
        least, most = template.format(self.least), template.format(self.most)
        return template.format(self.median) + ("" if least == most else f" ({least}–{most})")


@dataclass(frozen=True)
class Measure:
    """A figure of a round. Ratios are defined so that higher is better."""

    title: str
    of: Callable[[Round], float]
    template: str  # number format
    lower_is_better: bool = False

    def ratio(self, mine: Round, other: Round) -> float:
        a, b = self.of(mine), self.of(other)
        return b / a if self.lower_is_better else a / b

    def spread(self, rounds: Sequence[Round]) -> Spread:
        return Spread.of([self.of(found) for found in rounds])


MEASURES = (
    Measure("output tok/s", lambda found: found.output_tokens / found.seconds, "{:.1f}"),
    Measure("req/s", lambda found: found.num_requests / found.seconds, "{:.3f}"),
    Measure("prefill s", lambda found: found.prefill_seconds, "{:.2f}", lower_is_better=True),
    Measure("TPOT ms", lambda found: found.tpot_seconds * 1e3, "{:.1f}", lower_is_better=True),
    Measure("peak GB", lambda found: found.memory_bytes / 1e9, "{:.2f}", lower_is_better=True),
)


@dataclass
class EngineResult:
    version: str
    start_seconds: float
    rounds: list[Round] = field(default_factory=list)
    others_busy: list[float] = field(default_factory=list)  # cores used by idle engines


@dataclass
class Comparison:
    engines: dict[str, EngineResult] = field(default_factory=dict)  # by label, in order
    skipped: dict[str, str] = field(default_factory=dict)  # reason by label

    def add_engine(self, label: str, version: str, start_seconds: float) -> None:
        self.engines[label] = EngineResult(version, start_seconds)

    def add_round(self, label: str, found: Round, others_busy: float) -> None:
        self.engines[label].rounds.append(found)
        self.engines[label].others_busy.append(others_busy)

    @property
    def reference(self) -> str | None:
        """The engine that ratios refer to: the last that ran; None if it is the only one."""
        ran = [label for label, engine in self.engines.items() if engine.rounds]
        return ran[-1] if len(ran) > 1 else None

    def ratios(self, label: str, measure: Measure) -> Spread:
        """Return the spread of per-round ratios to the reference; above 1 is better."""
        assert self.reference is not None
        pairs = zip(self.engines[label].rounds, self.engines[self.reference].rounds, strict=False)
        return Spread.of([measure.ratio(mine, other) for mine, other in pairs])

    def table(self) -> Table:
        """Return a table with a row per measure, a column per engine and a column per ratio."""
        ran = {label: engine for label, engine in self.engines.items() if engine.rounds}
        rated = [label for label in ran if self.reference and label != self.reference]
        table = Table(title="median of the rounds (min–max); ratios above 1 are better")
        table.add_column("")
        for label, engine in ran.items():
            table.add_column(f"{label} {engine.version}", justify="right")
        for label in rated:
            table.add_column(f"{label} / {self.reference}", justify="right", style="bold")
        for measure in MEASURES:
            figures = [measure.spread(engine.rounds) for engine in ran.values()]
            row = [found.as_text(measure.template) for found in figures]
            row += [self.ratios(label, measure).as_text("{:.2f}") for label in rated]
            table.add_row(measure.title, *row)
        table.add_row("start s", *(f"{engine.start_seconds:.1f}" for engine in ran.values()))
        return table

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"machine": machine(), "skipped": self.skipped}
        found["engines"] = {label: asdict(engine) for label, engine in self.engines.items()}
        if self.reference is not None:
            found["reference"] = self.reference
            found["ratios"] = {
                label: {m.title: asdict(self.ratios(label, m)) for m in MEASURES}
                for label, engine in self.engines.items()
                if engine.rounds and label != self.reference
            }
        return found

    def write(self, console: Console, json_file: Path | None) -> None:
        for label, reason in self.skipped.items():
            console.print(f"{label} skipped: {reason}", markup=False)
        console.print(self.table())
        if json_file is not None:
            write_json(json_file, self.as_dict())
