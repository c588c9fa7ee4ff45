"""A progress bar on stderr: finished requests and tokens per second."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WINDOW = 5.0  # seconds over which the displayed rate is averaged


@contextlib.contextmanager
def request_bar(title: str, num_requests: int) -> Iterator[Callable[[int, int], None]]:
    """Yield a thread-safe `on_tokens(new_tokens, ended_requests)`; a no-op without a terminal."""
    if not sys.stderr.isatty():
        yield lambda tokens, ended: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:7.1f} tok/s"),
        TimeElapsedColumn(),
    )
    recent: deque[tuple[float, int]] = deque([(monotonic(), 0)])
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=num_requests, rate=0.0)

        def on_tokens(tokens: int, ended: int) -> None:
            with lock:
                now = monotonic()
                recent.append((now, tokens))
                while len(recent) > 1 and now - recent[0][0] > WINDOW:
                    recent.popleft()
                rate = sum(count for _, count in recent) / max(0.1, now - recent[0][0])
                bar.update(task, advance=ended, rate=rate)

        yield on_tokens
