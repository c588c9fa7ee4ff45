"""Progress bar on stderr for loading weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """Yield `on_progress(done_bytes, total_bytes)`; a no-op if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting workers", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, description="loading weights", completed=done, total=total)

        yield on_progress
