"""Restart a group's workers after a failure, up to a maximum rate."""

from __future__ import annotations

import logging
import time

from ..errors import ConfigError
from .group import WorkerGroup, WorkerGroupError

log = logging.getLogger("octavo.group")

RETRY_PAUSE = 1.0  # seconds after a failed restart, multiplied by the number of restarts
LONG_RESTART = 5.0  # seconds; most restarts take less
RESTART_WINDOW = 600.0  # seconds over which restarts are counted


class Restarts:
    """At most `max_restarts` restarts of a group in `RESTART_WINDOW`."""

    def __init__(self, group: WorkerGroup, max_restarts: int) -> None:
        self._group, self._max = group, max_restarts
        self.times: list[float] = []  # start times of the restarts within the window
        self.total = 0  # restarts since the engine started
        self._away_since: float | None = None  # start of the current restart, time.monotonic()

    @property
    def is_long(self) -> bool:
        """Whether the current restart takes longer than usual. Readable by any thread."""
        since = self._away_since
        return since is not None and time.monotonic() - since > LONG_RESTART

    def restart(self, error: WorkerGroupError) -> None:
        """Restart the group after `error`.

        Raises the last `WorkerGroupError` if there were too many restarts or the group is closing.
        """
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
            log.warning("%s; restarting the workers", error)
            try:
                self._group.restart()
            except (WorkerGroupError, ConfigError, OSError) as latest:
                error = WorkerGroupError(str(latest))
                self._group.given_up.wait(RETRY_PAUSE * len(self.times))
                continue
            log.warning("the workers were restarted in %.1f s", time.monotonic() - now)
            return
