"""Calls without a good API key, as whoever runs the server sees them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..stats import EngineStats

log = logging.getLogger("octavo.server")

LOG_EVERY = 10.0  # seconds between two lines at least: whoever tries keys does not fill the log


class KeyRefusals:
    """Counted in the metrics; told in the log, never with the key. Of one event loop."""

    def __init__(
        self, stats: EngineStats | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stats`: None where there is no engine to count for."""
        self._stats, self._clock = stats, clock
        self._num_untold, self._told_at = 0, float("-inf")

    def add(self, peer: str) -> None:
        """`peer`: where the call came from."""
        if self._stats is not None:
            self._stats.count_error("UNAUTHENTICATED")
        self._num_untold += 1
        now = self._clock()
        if now - self._told_at < LOG_EVERY:
            return
        text = "refused for want of a good API key: %d call(s) since this was last told, from %s"
        log.warning(text, self._num_untold, peer)
        self._num_untold, self._told_at = 0, now
