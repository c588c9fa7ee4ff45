"""How a server's log lines look: text, or one JSON object each.

A line's object has time (UTC), level, logger and message; request_id and other fields where the
call has them in `extra`; and exception, the traceback, where there is one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

VARIABLE = "OCTAVO_LOG_FORMAT"  # what workers, whose lines go to the same place, go by
FORMATS = ("text", "json")

THROTTLE_INTERVAL = 10.0  # seconds
MAX_LIBRARY_LINES = 20  # of one logger and level of a library
MAX_TRACEBACKS = 3  # from one line of code
MAX_REJECTIONS = 100  # requests that were rejected with one code

# What every record has; the rest is `extra`.
_COMMON = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _COMMON and name not in entry and not name.startswith("_"):
                entry[name] = value
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps(entry, default=str)


class Throttle(logging.Filter):
    """Limits what a client can write into the log by repeating a bad request: of records of one
    kind, at most so many pass in `THROTTLE_INTERVAL` seconds; the next one that passes says how
    many did not. All other records pass: they cost their cause more than a line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._lock = clock, threading.Lock()
        self._windows: dict[tuple[object, ...], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        found = _kind_of(record)
        if found is None:
            return True
        kind, limit = found
        now = self._clock()
        with self._lock:
            window = self._windows.setdefault(kind, _Window(now))
            if now - window.since >= THROTTLE_INTERVAL:
                self._windows[kind] = _Window(now)
                if window.count > limit:
                    text = f"{record.getMessage()} ({window.count - limit} similar lines left out)"
                    record.msg, record.args = text, ()
                window = self._windows[kind]
            window.count += 1
            return window.count <= limit


@dataclass
class _Window:
    since: float
    count: int = 0


def _kind_of(record: logging.LogRecord) -> tuple[tuple[object, ...], int] | None:
    """Return what a record is counted as, of a bounded number of kinds, and how many may pass."""
    is_ours = record.name == "octavo" or record.name.startswith("octavo.")
    if not is_ours:
        return (record.name, record.levelno), MAX_LIBRARY_LINES
    if record.exc_info:
        return (record.name, record.pathname, record.lineno), MAX_TRACEBACKS
    if getattr(record, "finish_reason", "") == "refused":
        return (record.name, getattr(record, "code", "")), MAX_REJECTIONS
    return None


def set_up_logs(form: str, text_format: str = "%(asctime)s %(levelname)s %(message)s") -> None:
    """Sends this process's log to stderr as `form`, one of `FORMATS`, and that of processes which
    it starts. Raises ValueError for another."""
    if form not in FORMATS:
        raise ValueError(f"--log-format {form}: must be {' or '.join(FORMATS)}")
    os.environ[VARIABLE] = form
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(text_format))
    handler.addFilter(Throttle())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def set_up_worker_logs() -> None:
    """The same in a worker: as whoever started it was told."""
    form = os.environ.get(VARIABLE, "text")
    set_up_logs(form if form in FORMATS else "text", "%(asctime)s %(name)s %(message)s")
