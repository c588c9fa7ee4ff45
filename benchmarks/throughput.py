"""Throughput: so many requests, all there from the start, through the engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from octavo.engine.config.hub import resolve_model
from octavo.engine.utils.progress import loading_bar

from .compare.engines import OctavoEngine, RequestTimes, run
from .options import WorkloadOptions
from .progress import request_bar

WARM_UP = 1_000_000  # added to the seed: requests that no measured run has


def start_engine(options: WorkloadOptions, settings: dict[str, Any]) -> OctavoEngine:
    """An engine that has answered one request, which is not of the workload."""
    # Before the model is loaded: what is wrong with an option, or with a line of a file, is told.
    first = options.make(resolve_model(settings["model"], settings["hub"]), 1, WARM_UP)[0]
    with loading_bar() as on_progress:
        engine = OctavoEngine(on_progress=on_progress, **settings)
    try:
        run(engine, [replace(first, max_tokens=2, after=None)])
    except BaseException:
        engine.close()
        raise
    return engine


def measure(
    options: WorkloadOptions,
    settings: dict[str, Any],
    sizes: Sequence[int],
    at_once: int | None = None,
) -> list[list[RequestTimes]]:
    """A run for each number of requests, `at_once` of them at a time. Raises ValueError."""
    engine = start_engine(options, settings)
    try:
        runs = []
        for number, size in enumerate(sizes):
            requests = options.make(engine.engine.config.model, size, number)
            with request_bar(f"{len(requests)} requests", len(requests)) as on_tokens:
                runs.append(run(engine, requests, at_once, on_tokens))
        return runs
    finally:
        engine.close()
