"""Counts and logs client errors that occur before a request is parsed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from .stats import EngineStats

log = logging.getLogger("octavo.server")

LOG_INTERVAL = 10.0  # seconds between lines of one reason, so that clients cannot fill the log

API_KEY = "api_key"
INVALID_HTTP = "invalid_http"
RECEIVE_TIMEOUT = "receive_timeout"
SEND_TIMEOUT = "send_timeout"
CONNECTION_LIMIT = "connection_limit"
TLS_HANDSHAKE = "tls_handshake"
ACCEPT_ERROR = "accept_error"

_TEXTS = {
    API_KEY: "rejected %d calls with a missing or invalid API key",
    INVALID_HTTP: "rejected %d requests that are not valid HTTP/1.1",
    RECEIVE_TIMEOUT: "closed %d connections whose request did not arrive in time",
    SEND_TIMEOUT: "closed %d connections whose client did not read its response",
    CONNECTION_LIMIT: "closed %d waiting connections to stay below the connection limits",
    TLS_HANDSHAKE: "closed %d connections that failed the TLS handshake",
    ACCEPT_ERROR: "failed %d times to accept a connection for lack of descriptors or memory",
}
CONNECTION_REASONS = tuple(reason for reason in _TEXTS if reason != API_KEY)


class RejectionLog:
    """Metrics and rate-limited log lines of rejected calls and closed connections.

    Metrics count every event; the log has at most one line per reason and `LOG_INTERVAL`. Log
    lines never contain a key or other client content. Not thread-safe.
    """

    def __init__(
        self, stats: EngineStats | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create a log. `stats`: counters of the engine; None to only log."""
        self._stats, self._clock = stats, clock
        self._num_unlogged: Counter[str] = Counter()
        self._logged_at: dict[str, float] = {}

    def add(self, reason: str, peer: str) -> None:
        """Count an event. `reason`: a constant of this module; `peer`: address of the client."""
        if self._stats is not None and reason == API_KEY:
            self._stats.count_error("UNAUTHENTICATED")
        elif self._stats is not None:
            self._stats.count_closed_connection(reason)
        self._num_unlogged[reason] += 1
        now = self._clock()
        if now - self._logged_at.get(reason, float("-inf")) < LOG_INTERVAL:
            return
        text = _TEXTS[reason] + " since the last report, latest from %s"
        log.warning(text, self._num_unlogged.pop(reason), peer)
        self._logged_at[reason] = now
