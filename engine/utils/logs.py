"""Log setup of servers and workers: text, or one JSON object per line.

An object has time (UTC), level, logger and message, the fields of `extra` such as request_id, and
the traceback in `exception` if there is one.
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

VARIABLE = "OCTAVO_LOG_FORMAT"  # passes the format to worker processes
FORMATS = ("text", "json")

THROTTLE_INTERVAL = 10.0  # seconds
MAX_LIBRARY_LINES = 20  # per logger and level of a library
MAX_TRACEBACKS = 3  # per line of code
MAX_REJECTIONS = 100  # rejected requests per status code

# Attributes of every record; others come from `extra`.
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
    """Rate limit of log lines that clients can cause by repeating a bad request.

    Per kind of record, a limited number passes in `THROTTLE_INTERVAL` seconds; the next one
    reports how many were suppressed. Other records always pass.
    """

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
                    text = f"{record.getMessage()} ({window.count - limit} similar suppressed)"
                    record.msg, record.args = text, ()
                window = self._windows[kind]
            window.count += 1
            return window.count <= limit


@dataclass
class _Window:
    since: float
    count: int = 0


def _kind_of(record: logging.LogRecord) -> tuple[tuple[object, ...], int] | None:
    """Return the kind of a record and its limit; None: not limited. Kinds are bounded in number."""
    is_ours = record.name == "octavo" or record.name.startswith("octavo.")
    if not is_ours:
        return (record.name, record.levelno), MAX_LIBRARY_LINES
    if record.exc_info:
        return (record.name, record.pathname, record.lineno), MAX_TRACEBACKS
    if getattr(record, "finish_reason", "") == "refused":
        return (record.name, getattr(record, "code", "")), MAX_REJECTIONS
    return None


def set_up_logs(form: str, text_format: str = "%(asctime)s %(levelname)s %(message)s") -> None:
    """Send the log of this process and its child processes to stderr.

    `form`: one of `FORMATS`, otherwise ValueError is raised.
    """
    if form not in FORMATS:
        raise ValueError(f"--log-format {form}: must be {' or '.join(FORMATS)}")
    os.environ[VARIABLE] = form
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(text_format))
    handler.addFilter(Throttle())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def set_up_worker_logs() -> None:
    """Set up the log of a worker in the format of the process that started it."""
    form = os.environ.get(VARIABLE, "text")
    set_up_logs(form if form in FORMATS else "text", "%(asctime)s %(name)s %(message)s")
