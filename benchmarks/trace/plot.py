"""Plot a recorded run: requests as rows, steps as columns, and below them resource usage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

NOT_THERE, WAITING, PREFILL, ENCODE, DECODE, PREEMPTED = range(6)
COLORS = ("#ffffff", "#e3e3e3", "#4c8fd6", "#f2a33a", "#58b06b", "#d9534f")
LABELS = {
    WAITING: "waiting",
    ENCODE: "encode an image, prefill",
    PREFILL: "prefill (tokens)",
    DECODE: "decode",
    PREEMPTED: "preempted: waiting to resume",
}
MARKS = {  # symbol, color and label by finish reason
    "stop": ("o", "#222222", "done"),
    "length": ("o", "#222222", "done"),
    "abort": ("X", "#7b3fa0", "aborted"),
    "error": ("X", "#c00000", "error or deadline"),
}
MAX_ROWS, MAX_NUMBERED = 400, 1500  # maximum of plotted requests; of cells with numbers


class TraceError(ValueError):
    """The file is not a trace, or does not contain the requested steps."""


@dataclass
class Trace:
    """The steps of a trace file, and each request's state at each step."""

    limits: dict[str, Any]
    steps: list[dict[str, Any]]
    has_run: frozenset[str] = frozenset()  # requests preempted before these steps
    names: list[str] = field(default_factory=list)  # in order of appearance

    def __post_init__(self) -> None:
        seen: dict[str, None] = {}
        for step in self.steps:
            seen |= dict.fromkeys([row["request"] for row in step["rows"]])
            seen |= dict.fromkeys([*step["waiting"], *step["idle"]])
        self.names = list(seen)[:MAX_ROWS]

    @classmethod
    def read(cls, path: Path, first: int = 0, end: int | None = None) -> Trace:
        """Read steps [first, end) of a file. Raises `TraceError` or OSError."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the program was killed while writing
        try:
            limits, *steps = (json.loads(line) for line in lines)
            limits["octavo_trace"]
        except (ValueError, IndexError, KeyError, TypeError):
            raise TraceError(f"{path}: not a trace recorded by Octavo") from None
        kept = [step for step in steps if step["step"] >= first and (not end or step["step"] < end)]
        if not kept:
            asked = f"{first}:{end or ''}"
            raise TraceError(f"{path}: has {len(steps)} steps, none of them in {asked}")
        before = [step for step in steps if step["step"] < first]
        return cls(limits, kept, frozenset(name for step in before for name in step["preempted"]))

    def states(self) -> npt.NDArray[np.int8]:
        """Return the state (NOT_THERE, WAITING, ...) as an array [requests, steps]."""
        row_of = {name: row for row, name in enumerate(self.names)}
        grid = np.full((len(self.names), len(self.steps)), NOT_THERE, np.int8)
        has_run = set(self.has_run)
        for column, step in enumerate(self.steps):
            has_run |= set(step["preempted"])
            encoding = {each["request"] for each in step["encode"]}
            for name in [*step["waiting"], *step["idle"]]:
                if name in row_of:
                    lost = name in has_run and name not in step["idle"]
                    grid[row_of[name], column] = PREEMPTED if lost else WAITING
            for row in step["rows"]:
                if row["request"] in row_of:
                    grid[row_of[row["request"]], column] = _state_of(row, encoding)
        return grid

    def cells(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield (row, column, record) for each row of each step."""
        row_of = {name: row for row, name in enumerate(self.names)}
        for column, step in enumerate(self.steps):
            for record in step["rows"]:
                if record["request"] in row_of:
                    yield row_of[record["request"]], column, record

    def series(self, name: str) -> npt.NDArray[np.float64]:
        return np.array([step[name] for step in self.steps], np.float64)


def _state_of(row: dict[str, Any], encoding: set[str]) -> int:
    if row["request"] in encoding:
        return ENCODE
    return DECODE if row["count"] == 1 and row["samples"] else PREFILL


def draw(trace: Trace, path: Path) -> None:
    """Write a plot in the format given by the path's suffix (png, svg, pdf)."""
    width = min(40.0, max(11.0, 0.34 * len(trace.steps) + 3))
    height = min(60.0, max(2.0, 0.27 * len(trace.names)))
    figure = Figure(figsize=(width, height + 6.2), layout="constrained")
    grid, tokens, blocks, seconds = figure.subplots(
        4, 1, sharex=True, height_ratios=[height, 1.3, 1.3, 1.3]
    )
    _draw_requests(grid, trace)
    _draw_tokens(tokens, trace)
    _draw_blocks(blocks, trace)
    _draw_seconds(seconds, trace)
    seconds.set_xlabel("step")
    seconds.set_xlim(-0.5, len(trace.steps) - 0.5)
    every = max(1, len(trace.steps) // 40)
    ticks = range(0, len(trace.steps), every)
    seconds.set_xticks(list(ticks), [str(trace.steps[i]["step"]) for i in ticks])
    figure.savefig(path, dpi=110)


def _draw_requests(axes: Axes, trace: Trace) -> None:
    axes.imshow(
        trace.states(),
        ListedColormap(COLORS),
        vmin=-0.5,
        vmax=len(COLORS) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_yticks(range(len(trace.names)), [_short(name) for name in trace.names], fontsize=8)
    if len(trace.steps) <= 150:
        axes.set_xticks(np.arange(-0.5, len(trace.steps)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(trace.names)), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    if len(trace.steps) * len(trace.names) <= MAX_NUMBERED:
        for row, column, record in trace.cells():
            if record["count"] > 1:
                text, at = str(record["count"]), (column + 0.08, row)
                axes.text(*at, text, ha="center", va="center", fontsize=7, color="white")
    _mark_events(axes, trace)
    handles: list[Any] = [Patch(color=COLORS[state], label=text) for state, text in LABELS.items()]
    handles += [
        _mark("D", "#0b7a75", "starts with a cached prefix"),
        _mark("v", "#7a1512", "preempted here"),
        *(_mark(*MARKS[status]) for status in ("stop", "abort", "error")),
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8, frameon=False
    )


def _mark_events(axes: Axes, trace: Trace) -> None:
    row_of = {name: row for row, name in enumerate(trace.names)}
    positions: dict[tuple[str, str], list[tuple[float, float]]] = {}
    drawn = trace.states() != NOT_THERE
    for column, step in enumerate(trace.steps):
        hits = [each["request"] for each in step["started"] if each["cached"]]
        events = [(name, -0.34, "D", "#0b7a75") for name in hits]
        events += [(name, -0.34, "v", "#7a1512") for name in step["preempted"]]
        events += [(each["request"], 0.34, *MARKS[each["status"]][:2]) for each in step["ended"]]
        for name, shift, symbol, color in events:
            if name in row_of:
                row = row_of[name]
                there = column if drawn[row, column] else column - 1  # it finished before this step
                positions.setdefault((symbol, color), []).append((there + shift, row))
    for (symbol, color), at in positions.items():
        x, y = zip(*at, strict=True)
        size = {"X": 8.0, "o": 5.5}.get(symbol, 4.5)
        axes.plot(x, y, symbol, color=color, markersize=size, markeredgecolor="white")


def _mark(symbol: str, color: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker=symbol, linestyle="", markersize=5, label=label)


def _draw_tokens(axes: Axes, trace: Trace) -> None:
    """Plot the tokens of each step by purpose, and the token budget."""
    kinds = np.zeros((2, len(trace.steps)))
    for column, step in enumerate(trace.steps):
        for row in step["rows"]:
            decodes = row["count"] == 1 and row["samples"]
            kinds[int(decodes), column] += row["count"]
    encoded = [sum(each["tokens"] for each in step["encode"]) for step in trace.steps]
    columns = np.arange(len(trace.steps))
    _stack(axes, (kinds[1], kinds[0]), (COLORS[DECODE], COLORS[PREFILL]), ("decode", "prefill"))
    axes.plot(
        columns, encoded, "_", color=COLORS[ENCODE], markersize=9, label="image tokens encoded"
    )
    most = trace.limits["max_num_batched_tokens"]
    if kinds.sum(axis=0).max() * 3 > most:
        axes.axhline(most, color="#888888", linewidth=0.8, linestyle="--", label="token budget")
    _finish(axes, "tokens")


def _draw_blocks(axes: Axes, trace: Trace) -> None:
    """Plot blocks in use, free blocks with a cached prefix, and empty blocks."""
    total = trace.limits["num_blocks"]
    free, cached = trace.series("free_blocks"), trace.series("cached_blocks")
    labels = ("in use", "free, cached", "free, empty")
    colors = (COLORS[PREFILL], "#b9d3ee", "#f4f4f4")
    _stack(axes, (total - free, cached, free - cached), colors, labels)
    share = trace.series("encoder_tokens") / max(1, trace.limits["encoder_cache_tokens"])
    share *= 0.98  # keeps a full cache visible below the edge
    label = "encoder cache usage"
    columns = np.arange(len(trace.steps))
    axes.plot(columns, share * total, color=COLORS[ENCODE], drawstyle="steps-mid", label=label)
    most = float((total - free + cached).max())
    axes.set_ylim(
        0, total if most * 4 > total else most * 1.3
    )  # zoom in if a large cache is mostly unused
    _finish(axes, "KV blocks")


def _draw_seconds(axes: Axes, trace: Trace) -> None:
    run, own = trace.series("run_ms"), trace.series("schedule_ms") + trace.series("update_ms")
    _stack(axes, (run, own), ("#9a9a9a", "#222222"), ("workers", "scheduler"))
    _finish(axes, "ms")


def _stack(
    axes: Axes,
    layers: tuple[npt.NDArray[np.float64], ...],
    colors: tuple[str, ...],
    labels: tuple[str, ...],
) -> None:
    """Plot the layers stacked, with one bar per step."""
    edges = np.arange(len(layers[0]) + 1) - 0.5
    base = np.zeros(len(layers[0]))
    for layer, color, label in zip(layers, colors, labels, strict=True):
        axes.stairs(base + layer, edges, baseline=base, fill=True, color=color, label=label)
        base = base + layer


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(name: str, most: int = 24) -> str:
    """Shorten a name in the middle; both ends distinguish requests and their samples."""
    return name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}"


def parse_steps(text: str | None) -> tuple[int, int | None]:
    """Parse FIRST:END, either of which may be omitted. Raises `TraceError` if it is malformed."""
    first, colon, end = (text or ":").partition(":")
    try:
        bounds = (int(first or 0), int(end) if end else None)
    except ValueError:
        bounds = (-1, None)
    if not colon or bounds[0] < 0:
        raise TraceError(f"--steps {text}: must be FIRST:END, such as 0:200")
    return bounds
