"""Plots of benchmark results, styled for a README."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .compare.engines import RequestTimes
from .report import Latency, itl, tpot, ttft

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Report
    from .serve_load import LoadPoint

BLUE, ORANGE, GREEN, GREY, INK = "#2f6fb5", "#e08a1e", "#3f9c57", "#9aa0a6", "#2b2f33"
SHADES = {"p99": 0.3, "p90": 0.6, "p50": 1.0}  # drawn in this order: the darkest on top
STYLE: Any = {  # matplotlib's own type is a literal of 300 keys
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ea",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "savefig.dpi": 160,
}


def check(path: Path | None) -> None:
    """Raise ValueError, before measuring, if `path` cannot be plotted to."""
    if path is None:
        return
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: must end in .png, .svg or .pdf")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib: pip install 'octavo[plot]', or pip install matplotlib"
        ) from None


def _panels(count: int, draw: Callable[[Sequence[Axes]], None], title: str, path: Path) -> None:
    """Draw a row of panels under one title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure: Figure
        figure, axes = plt.subplots(1, count, figsize=(9.0, 3.6), squeeze=False)
        draw(list(axes[0]))
        figure.suptitle(title, x=0.01, y=0.995, ha="left", fontsize=10, color="#5f6368")
        figure.tight_layout(rect=(0, 0, 1, 1.04), w_pad=3)
        figure.savefig(path, facecolor="white")
        plt.close(figure)


def draw_batches(reports: Mapping[int, Report], title: str, path: Path) -> None:
    """Plot throughput and time per token by number of concurrent requests."""

    def draw(axes: Sequence[Axes]) -> None:
        sizes = list(reports)
        rate = [report.output_tokens_per_second for report in reports.values()]
        _line(axes[0], sizes, rate, BLUE, "output tok/s")
        for x, y in zip(sizes, rate, strict=True):
            axes[0].annotate(_short(y), (x, y), (-3, 8), textcoords="offset points", ha="center")
        axes[0].set_title("Output throughput, tokens/s")
        axes[0].set_ylim(0, max(rate) * 1.18)
        _percentiles(axes[1], sizes, [report.tpot for report in reports.values()], ORANGE)
        axes[1].set_title("Time per output token, ms")
        for each in axes:
            each.set_xscale("log", base=2)
            _ticks(each, sizes)
            each.set_xlabel("concurrent requests")

    _panels(2, draw, title, path)


def draw_rates(points: Sequence[LoadPoint], title: str, path: Path) -> None:
    """Plot TTFT and TPOT by request rate, with the goodput bounds."""

    def draw(axes: Sequence[Axes]) -> None:
        finite = [point for point in points if np.isfinite(point.request_rate)]
        rates = [point.request_rate for point in finite]
        ttfts = [point.report.ttft for point in finite]
        tpots = [point.report.tpot for point in finite]
        _percentiles(axes[0], rates, ttfts, BLUE, 1.0)
        axes[0].set_title("Time to first token, s")
        _percentiles(axes[1], rates, tpots, ORANGE)
        axes[1].set_title("Time per output token, ms")
        bounds = points[0].bounds
        for each, bound in ((axes[0], _over(bounds.ttft_ms, 1e3)), (axes[1], bounds.tpot_ms)):
            if bound is not None:
                style: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 1.2}
                each.axhline(bound, label="bound", **style)
                handles, labels = each.get_legend_handles_labels()
                each.legend([*handles[2::-1], handles[3]], [*labels[2::-1], labels[3]])
            each.set_xlabel("requests/s (Poisson)")
            each.set_xlim(0, max(rates) * 1.05)

    if not any(np.isfinite(point.request_rate) for point in points):
        raise ValueError("--plot: requires a finite --request-rate")
    _panels(2, draw, title, path)


def draw_latencies(seen: Sequence[RequestTimes], title: str, path: Path) -> None:
    """Plot the distributions of TTFT, TPOT and ITL over a run's requests."""

    def draw(axes: Sequence[Axes]) -> None:
        done = [each for each in seen if not each.error]
        _shares(axes[0], [ttft(each) for each in done], BLUE, "Time to first token")
        _shares(axes[1], [tpot(each) for each in done], ORANGE, "Time per output token")
        _shares(axes[2], [gap for each in done for gap in itl(each)], GREEN, "Inter-token latency")
        axes[0].set_ylabel("share of requests")
        axes[2].set_ylabel("share of tokens")

    _panels(3, draw, title, path)


def draw_starts(starts: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plot the phases of each start."""
    colors = (BLUE, "#7fb0e3", ORANGE, GREEN)

    def draw(axes: Sequence[Axes]) -> None:
        names = list(dict.fromkeys(name for start in starts for name in start["phases"]))
        rows = np.arange(len(starts))
        left = np.zeros(len(starts))
        for name, color in zip(names, colors, strict=False):
            width = np.array([start["phases"].get(name, 0.0) for start in starts])
            axes[0].barh(rows, width, 0.6, left, color=color, label=name)
            left += width
        for row, start in zip(rows, starts, strict=True):
            axes[0].annotate(f" {start['seconds']:.1f} s", (start["seconds"], row), va="center")
        axes[0].set_yticks(rows, [f"start {row + 1}" for row in rows])
        axes[0].invert_yaxis()
        axes[0].grid(axis="y", visible=False)
        axes[0].set_xlim(0, max(left) * 1.12)
        axes[0].set_xlabel("seconds until ready")
        axes[0].legend(ncol=4, loc="lower left", bbox_to_anchor=(0, 1.0))

    _panels(1, draw, title, path)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], color: str, label: str) -> None:
    axes.plot(x, y, "-o", color=color, markeredgecolor="white", label=label)


def _percentiles(
    axes: Axes, x: Sequence[float], latencies: Sequence[Latency], color: str, unit: float = 1e3
) -> None:
    """Plot p50, p90 and p99 in shades of one color."""
    for name, shade in SHADES.items():
        y = [getattr(latency, name) * unit for latency in latencies]
        axes.plot(x, y, "-o", color=_lighter(color, shade), markeredgecolor="white", label=name)
    axes.set_ylim(bottom=0)
    axes.legend(*(each[::-1] for each in axes.get_legend_handles_labels()), loc="upper left")


def _lighter(color: str, shade: float) -> tuple[float, ...]:
    """Mix the color with white, so that crossing lines stay distinguishable."""
    from matplotlib.colors import to_rgb

    return tuple(1 - shade * (1 - part) for part in to_rgb(color))


def _shares(axes: Axes, seconds: Sequence[float], color: str, title: str) -> None:
    """Plot the cumulative distribution of `seconds`, in milliseconds."""
    values = np.sort(np.array(seconds)) * 1e3
    axes.set_title(title)
    axes.set_xlabel("ms")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if len(values):
        axes.step(
            np.concatenate((values[:1], values)),
            np.arange(len(values) + 1) / len(values),
            where="post",
            color=color,
        )
        middle = float(np.median(values))
        axes.axvline(middle, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(f" p50 {_short(middle)}", (middle, 0.03), color="#5f6368")


def _ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def _over(value: float | None, divisor: float) -> float | None:
    return None if value is None else value / divisor


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
