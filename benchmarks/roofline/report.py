"""Results of a roofline run: limits, fractions of them, tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from .machine import Machine, name_of
from .stages import ATTENTION, DECODE, HEAD, LINEARS, PREFILL, STAGES, VISION, StageClock

REST = "everything else"
NAN = float("nan")


@dataclass(frozen=True)
class Stage:
    """Time and work of a stage.

    Its limit is the longer of moving the bytes and multiplying; 0 if it has none.
    """

    name: str
    seconds: float
    bytes: int
    operations: int
    limit_seconds: float

    @classmethod
    def of(cls, name: str, clock: StageClock, machine: Machine, numbers: str) -> Stage:
        work = clock.work_of(name)
        limit = machine.seconds(work.bytes, work.operations, numbers)
        seconds = _timed(clock, lambda _, stage: stage == name)
        return cls(name, seconds, work.bytes, work.operations, limit)

    @property
    def fraction(self) -> float:
        """Fraction of the limit that was reached; NaN without a limit."""
        return self.limit_seconds / self.seconds if self.limit_seconds else NAN


@dataclass(frozen=True)
class Alone:
    """The decoder's packed linears and head alone, without the other operations."""

    rows: int
    seconds: float
    weight_bytes: int
    operations: int


@dataclass(frozen=True)
class Roofline:
    """Results of a run; times are in seconds."""

    machine: Machine
    alone: list[Alone]
    stages: list[Stage]  # sum up to `seconds`
    rest: dict[str, float]  # time outside the stages: vision tower, prefill, decode
    seconds: float
    tower_seconds: float
    prefill_seconds: float  # without the tower
    prefill_tokens: int
    decode_steps: list[float]
    batch: int
    others_share: float  # share of CPU time used by other processes

    @classmethod
    def of(
        cls,
        clock: StageClock,
        machine: Machine,
        alone: list[Alone],
        prefill_tokens: int,
        batch: int,
        numbers: str,
        others_share: float,
    ) -> Roofline:
        """Build the results; `numbers` is the number format of the linears."""
        kinds = {name: name_of(clock.runner.dtype) for name in STAGES}
        kinds |= {name: numbers for name in STAGES if LINEARS in name or name == HEAD}
        stages = [Stage.of(name, clock, machine, kinds[name]) for name in STAGES]
        prefill, decode = clock.seconds_of(PREFILL), clock.seconds_of(DECODE)
        rest = {
            VISION: clock.tower_seconds - _timed(clock, lambda _, stage: VISION in stage),
            PREFILL: prefill
            - clock.tower_seconds
            - _timed(clock, lambda phase, stage: phase == PREFILL and VISION not in stage),
            DECODE: decode - _timed(clock, lambda phase, _: phase == DECODE),
        }
        stages.append(Stage(REST, sum(rest.values()), 0, 0, 0.0))
        return cls(
            machine=machine,
            alone=alone,
            stages=stages,
            rest=rest,
            seconds=prefill + decode,
            tower_seconds=clock.tower_seconds,
            prefill_seconds=prefill - clock.tower_seconds,
            prefill_tokens=prefill_tokens,
            decode_steps=clock.steps[DECODE],
            batch=batch,
            others_share=others_share,
        )

    @property
    def linears_alone(self) -> float:
        """Time of the linears alone at the run's batch size."""
        return next(each.seconds for each in self.alone if each.rows == self.batch)

    @property
    def decode_fraction(self) -> float:
        """Time of the linears alone over that of a whole step."""
        return self.linears_alone / statistics.median(self.decode_steps)

    def limit(self, *names: str) -> float:
        return sum(stage.limit_seconds for stage in self.stages if stage.name in names)

    @property
    def prefill_fraction(self) -> float:
        """Prefill's matmuls at the matrix peak, over its time without the vision tower."""
        operations = self.limit(f"{PREFILL} linears", f"{PREFILL} {ATTENTION}")
        return operations / self.prefill_seconds

    @property
    def vision_fraction(self) -> float:
        """Vision matmuls at the matrix peak, over the tower's time; NaN without images."""
        least = self.limit(f"{VISION} linears", f"{VISION} {ATTENTION}")
        return least / self.tower_seconds if self.tower_seconds else NAN

    def as_dict(self) -> dict[str, Any]:
        names = ("decode_fraction", "prefill_fraction", "vision_fraction")
        found: dict[str, Any] = asdict(self) | {name: getattr(self, name) for name in names}
        stages = [asdict(stage) | {"fraction": stage.fraction} for stage in self.stages]
        found["limits"] = found.pop("machine")  # "machine" names the hardware in a report
        per_second = self.prefill_tokens / self.prefill_seconds
        return found | {"stages": stages, "prefill_tokens_per_second": per_second}


def _timed(clock: StageClock, chosen: Callable[[str, str], bool]) -> float:
    """Return the seconds of the stages for which `chosen(phase, name)` is true."""
    return sum(seconds for key, seconds in clock.seconds.items() if chosen(*key))


def tables(found: Roofline, title: str) -> list[Table]:
    return [machine_table(found), stage_table(found, title), whole_table(found)]


def machine_table(found: Roofline) -> Table:
    others = f"other processes used {found.others_share:.0%} of the machine's CPU time"
    table = _table("This machine, and the packed linears alone", others)
    for column in ("ms", "GB/s", "GOP/s", "rows/s"):
        table.add_column(column, justify="right")
    table.add_row("memory read", "", f"{found.machine.bandwidth / 1e9:.1f}", "", "")
    for name, peak in found.machine.peaks.items():
        table.add_row(f"{name} matmuls", "", "", f"{peak / 1e9:,.0f}", "")
    for each in found.alone:
        table.add_row(
            f"linears alone, {each.rows} rows",
            f"{each.seconds * 1e3:,.1f}",
            f"{each.weight_bytes / each.seconds / 1e9:.1f}",
            f"{each.operations / each.seconds / 1e9:,.0f}",
            f"{each.rows / each.seconds:,.1f}",
        )
    return table


def stage_table(found: Roofline, title: str) -> Table:
    """Return a table with a row per stage; stages that did not run are omitted."""
    table = _table(title, _rest_line(found))
    for column in ("ms", "share", "GB", "GOP", "limit ms", "of the limit"):
        table.add_column(column, justify="right")
    for stage in found.stages:
        if stage.seconds:
            table.add_row(*_cells(stage, found.seconds))
    whole = [sum(getattr(stage, name) for stage in found.stages) for name in SUMMED]
    table.add_row(*_cells(Stage("total", found.seconds, *whole), found.seconds))
    return table


SUMMED = ("bytes", "operations", "limit_seconds")


def _cells(stage: Stage, whole: float) -> list[str]:
    known = bool(stage.limit_seconds)
    return [
        stage.name,
        f"{stage.seconds * 1e3:,.1f}",
        f"{stage.seconds / whole:.1%}",
        f"{stage.bytes / 1e9:,.2f}" if known else "",
        f"{stage.operations / 1e9:,.1f}" if known else "",
        f"{stage.limit_seconds * 1e3:,.1f}" if known else "",
        f"{stage.fraction:.0%}" if known else "",
    ]


def _rest_line(found: Roofline) -> str:
    parts = [f"{name} {seconds * 1e3:,.1f} ms" for name, seconds in found.rest.items() if seconds]
    return f"{REST}: {', '.join(parts)}"


def whole_table(found: Roofline) -> Table:
    """Return a table of prefill, decode and the vision tower against their limits."""
    step = statistics.median(found.decode_steps)
    table = _table("Overall", "prefill and tower: matmuls and attention at their limits")
    for column in ("measured", "limit", "fraction"):
        table.add_column(column, justify="right")
    table.add_row(
        f"decode step of {found.batch}",
        f"{step * 1e3:,.1f} ms, {found.batch / step:,.1f} tok/s",
        f"{found.linears_alone * 1e3:,.1f} ms, packed linears alone",
        f"{found.decode_fraction:.0%}",
    )
    rate = found.prefill_tokens / found.prefill_seconds
    table.add_row(
        "prefill",
        f"{rate:,.1f} tok/s",
        f"{rate / found.prefill_fraction:,.1f} tok/s, matrix peak",
        f"{found.prefill_fraction:.0%}",
    )
    if found.tower_seconds:
        table.add_row(
            "vision tower",
            f"{found.tower_seconds * 1e3:,.1f} ms",
            f"{found.tower_seconds * found.vision_fraction * 1e3:,.1f} ms, matrix peak",
            f"{found.vision_fraction:.0%}",
        )
    return table


def _table(title: str, caption: str) -> Table:
    table = Table(title=title, title_justify="left", caption=caption)
    table.add_column("")
    return table
