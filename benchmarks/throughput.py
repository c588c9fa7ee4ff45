"""Throughput of the engine in this process, with all requests submitted at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from octavo.engine.config.hub import resolve_model
from octavo.engine.utils.progress import loading_bar

from .compare.engines import OctavoEngine, RequestTimes, run
from .options import WorkloadOptions
from .progress import request_bar

WARM_UP = 1_000_000  # seed offset, so that the warm-up request occurs in no measured run


def start_engine(options: WorkloadOptions, settings: dict[str, Any]) -> OctavoEngine:
    """Start an engine and warm it up with a request that is not part of the workload."""
    # Make a request before loading the model, to report invalid options and files at once.
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
    """Run each number of requests, `at_once` of them concurrently. Raises ValueError."""
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
