"""How a server's log lines look: text, or one JSON object each.

A line's object has time (UTC), level, logger and message; request_id and other fields where the
call has them in `extra`; and exception, the traceback, where there is one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

VARIABLE = "OCTAVO_LOG_FORMAT"  # what workers, whose lines go to the same place, go by
FORMATS = ("text", "json")

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


def set_up_logs(form: str, text_format: str = "%(asctime)s %(levelname)s %(message)s") -> None:
    """Sends this process's log to stderr as `form`, one of `FORMATS`, and that of processes which
    it starts. Raises ValueError for another."""
    if form not in FORMATS:
        raise ValueError(f"--log-format {form}: must be {' or '.join(FORMATS)}")
    os.environ[VARIABLE] = form
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(text_format))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def set_up_worker_logs() -> None:
    """The same in a worker: as whoever started it was told."""
    form = os.environ.get(VARIABLE, "text")
    set_up_logs(form if form in FORMATS else "text", "%(asctime)s %(name)s %(message)s")
