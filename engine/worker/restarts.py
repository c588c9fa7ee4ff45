"""Starts a group's workers anew when they end, but not for ever."""

from __future__ import annotations

import logging
import time

from ..config import ConfigError
from .group import WorkerGroup, WorkerGroupError

log = logging.getLogger("octavo.group")

AGAIN_PAUSE = 1.0  # seconds, times the restarts so far, after one that failed
RESTART_WINDOW = 600.0  # seconds in which restarts are counted


class Restarts:
    """At most `max_restarts` restarts of a group in `RESTART_WINDOW`."""

    def __init__(self, group: WorkerGroup, max_restarts: int) -> None:
        self._group, self._max = group, max_restarts
        self.times: list[float] = []  # of the restarts that count
        self.total = 0  # of all

    def restart(self, error: WorkerGroupError) -> None:
        """Brings the group back after `error`. Raises the latest `WorkerGroupError` when it has
        ended too often, or is to close."""
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
