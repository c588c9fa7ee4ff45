"""A server's engine, watched: metrics at a port, spans to a collector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..async_llm import AsyncLLM
from ..cli_watch import WatchOptions
from ..spans import sending_spans
from .metrics import serving_metrics


@contextmanager
def watched(engine: AsyncLLM, host: str, options: WatchOptions) -> Iterator[str]:
    """Until the end. Gives what the ready line is to say of it: " metrics=HOST:PORT", or nothing.

    Raises OSError for a port that is taken, ValueError where the libraries for spans are not there.
    """
    with (
        serving_metrics(engine.engine.stats, host, options.metrics_port) as address,
        sending_spans(options.otlp_endpoint) as spans,
    ):
        engine.spans = spans
        yield f" metrics={address}" if address else ""
