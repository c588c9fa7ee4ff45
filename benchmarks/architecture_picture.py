"""Draw `docs/architecture.png`: processes, threads and files that a request passes.

python -P -m octavo.benchmarks.architecture_picture docs/architecture.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .plots import BLUE, GREEN, GREY, INK, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 13.3, 7.4  # inches; also the coordinates of the drawing


@dataclass(frozen=True)
class Box:
    """A step of the path, with the files that implement it."""

    left: float
    bottom: float
    width: float
    height: float
    title: str
    files: tuple[str, ...]
    color: str


SERVER = Box(
    0.4,
    4.5,
    3.5,
    1.6,
    "1  API server",
    ("server/http_api/openai_routes.py", "server/grpc_api/inference.py", "async_llm.py"),
    BLUE,
)
INPUT = Box(
    4.5,
    4.5,
    3.2,
    1.6,
    "2  Preprocessing",
    ("input/preprocess_pool.py", "input/processor.py", "media/"),
    ORANGE,
)
STEP = Box(
    8.3,
    4.5,
    4.6,
    1.6,
    "3  Admission   4  Plan   5  Send",
    (
        "core/step_loop.py, core/engine.py",
        "scheduler/scheduler.py",
        "core/step_pipeline.py, worker/group.py",
    ),
    GREEN,
)
DELIVER = Box(0.4, 2.5, 3.5, 1.25, "8  Deliver", ("request_stream.py", "outputs.py"), BLUE)
UPDATE = Box(
    9.4,
    2.5,
    3.5,
    1.25,
    "7  Update",
    ("core/active_requests.py", "core/detokenizer.py"),
    GREEN,
)
DECODERS = Box(4.5, 0.2, 3.2, 0.9, "Decoder processes", ("media/sandbox/child.py",), ORANGE)
WORKERS = Box(
    8.3,
    0.2,
    4.6,
    1.25,
    "6  Compute: one process per rank",
    ("worker/worker.py", "runner/model_runner.py"),
    INK,
)
BOXES = (SERVER, INPUT, STEP, DELIVER, UPDATE, DECODERS, WORKERS)
ARROWS = (  # from, to, text, where the text is
    ((1.0, 7.2), (1.0, 6.1), "HTTP, gRPC", (1.1, 6.93)),
    ((3.9, 5.3), (4.5, 5.3), "", (0, 0)),
    ((7.7, 5.3), (8.3, 5.3), "", (0, 0)),
    ((8.85, 4.5), (8.85, 1.45), "batches", (8.05, 1.75)),
    ((11.1, 1.45), (11.1, 2.5), "results", (11.2, 1.75)),
    ((9.4, 3.1), (3.9, 3.1), "deltas", (4.6, 3.2)),
    ((1.0, 2.5), (1.0, 1.5), "events, messages", (1.1, 1.75)),
    ((6.0, 4.5), (6.0, 1.1), "files", (5.5, 1.75)),
    ((6.5, 1.1), (6.5, 4.5), "pixels", (6.6, 1.75)),
)


def draw(path: Path) -> None:
    """Write the drawing to `path`, in the format of its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.axis("off")
    _frame(axes)
    for start, end, text, at in ARROWS:
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4}
        axes.annotate("", xy=end, xytext=start, arrowprops=style)
        axes.text(at[0], at[1], text, fontsize=10, color=INK)
    for box in BOXES:
        _draw_box(axes, box)
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white")


def _frame(axes: Axes) -> None:
    """Draw the engine process, and name the threads in it."""
    from matplotlib.patches import Rectangle

    frame = Rectangle((0.15, 2.25), 13.0, 4.6, facecolor="#f5f6f7", edgecolor=GREY, zorder=0)
    axes.add_patch(frame)
    axes.text(13.1, 6.93, "engine process", ha="right", fontsize=10, color=INK)
    threads = ((2.4, "event loop"), (6.1, "thread pool"), (10.6, "step thread"))
    for x, name in threads:
        axes.text(x, 6.35, name, ha="center", fontsize=11, style="italic", color=INK)


def _draw_box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        (box.left, box.bottom),
        box.width,
        box.height,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor="white",
        edgecolor=box.color,
        linewidth=2,
    )
    axes.add_patch(shape)
    top = box.bottom + box.height - 0.3
    axes.text(box.left + 0.15, top, box.title, fontsize=11, weight="bold", color=box.color)
    for number, name in enumerate(box.files, 1):
        axes.text(box.left + 0.15, top - 0.37 * number, name, fontsize=9, family="monospace")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
