"""Starts a group's workers anew when they end, but not for ever."""

from __future__ import annotations

import logging
import time

from ..errors import ConfigError
from .group import WorkerGroup, WorkerGroupError

log = logging.getLogger("octavo.group")

AGAIN_PAUSE = 1.0  # seconds, times the restarts so far, after one that failed
LONG = 5.0  # seconds; most restarts are over by then
RESTART_WINDOW = 600.0  # seconds in which restarts are counted


class Restarts:
    """At most `max_restarts` restarts of a group in `RESTART_WINDOW`."""

    def __init__(self, group: WorkerGroup, max_restarts: int) -> None:
        self._group, self._max = group, max_restarts
        self.times: list[float] = []  # of the restarts that count
        self.total = 0  # of all
        self._away_since: float | None = None  # the workers; on the monotonic clock

    @property
    def is_long(self) -> bool:
        """Whether the workers have been away for long. Any thread."""
        since = self._away_since
        return since is not None and time.monotonic() - since > LONG

    def restart(self, error: WorkerGroupError) -> None:
        """Brings the group back after `error`. Raises the latest `WorkerGroupError` when it has
        ended too often, or is to close."""
        self._away_since = time.monotonic()
        try:
            self._restart(error)
        finally:
            self._away_since = None

    def _restart(self, error: WorkerGroupError) -> None:
        while True:
            now = time.monotonic()
            self.times = [at for at in self.times if at > now - RESTART_WINDOW]
            if len(self.times) >= self._max or self._group.given_up.is_set():
                raise error
            self.times.append(now)
            self.total += 1
            log.warning("%s; the workers are started anew", error)
            try:
                self._group.restart()
            except (WorkerGroupError, ConfigError, OSError) as again:
                error = WorkerGroupError(str(again))
                self._group.given_up.wait(AGAIN_PAUSE * len(self.times))
                continue
            log.warning("the workers are back after %.1f s", time.monotonic() - now)
            return
