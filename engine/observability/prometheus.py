"""Prometheus metrics of one engine, computed on scrape from `EngineStats`.

Each engine has its own registry, so that several engines can run in one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .histogram import Histogram
from .rejection_log import CONNECTION_REASONS
from .stats import EngineLoad, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Numbers = Mapping[str, float]


def metrics_text(stats: EngineStats) -> bytes:
    """Return the metrics in Prometheus' text format, `CONTENT_TYPE`."""
    return generate_latest(metrics_registry(stats))


def metrics_registry(stats: EngineStats) -> CollectorRegistry:
    """Return a registry with the metrics of one engine."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(stats))
    return registry


class _EngineCollector(Collector):
    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        load = stats.load()
        yield from _requests(stats, load)
        yield from _connections(stats)
        yield from _tokens(stats, load)
        yield from _times(stats)
        yield from _caches(stats, load)
        yield from _workers(stats)


def _requests(stats: EngineStats, load: EngineLoad) -> Iterator[Metric]:
    yield _gauge("requests_running", "Number of requests currently running.", load.num_running)
    yield _gauge(
        "requests_waiting",
        "Number of requests waiting to be scheduled, including preempted ones; each of n answers "
        "counts.",
        load.num_waiting,
    )
    yield _gauge(
        "requests_preparing",
        "Number of requests being preprocessed or not yet admitted to the scheduler.",
        load.num_preparing,
    )
    ends = {"stop": 0, "length": 0, "abort": 0, "error": 0, "refused": 0, **stats.ends}
    yield _counter(
        "requests", "Number of finished requests by finish reason.", ends, "finish_reason"
    )
    errors = {"INTERNAL": 0, **stats.errors}
    text = "Number of rejected or failed requests by status code."
    yield _counter("request_errors", text, errors, "code")
    text = "Number of preemptions of running requests."
    yield _counter("preemptions", text, {"": stats.num_preemptions})


def _connections(stats: EngineStats) -> Iterator[Metric]:
    closed = {**dict.fromkeys(CONNECTION_REASONS, 0), **stats.closed_connections}
    text = "Number of connections closed by the HTTP and metrics servers, by reason."
    yield _counter("connections_closed", text, closed, "reason")


def _tokens(stats: EngineStats, load: EngineLoad) -> Iterator[Metric]:
    for name, text, value in (
        ("prompt_tokens", "Number of prompt tokens of started requests.", stats.num_prompt_tokens),
        (
            "cached_prompt_tokens",
            "Number of prompt tokens found in the prefix cache.",
            stats.num_cached_tokens,
        ),
        ("output_tokens", "Number of generated tokens.", stats.num_output_tokens),
        (
            "prefill_tokens",
            "Number of tokens computed in prefill, including recomputation after preemption.",
            stats.num_prefill_tokens,
        ),
        ("decode_tokens", "Number of tokens computed in decode.", stats.num_decode_tokens),
        (
            "encode_tokens",
            "Number of image and video tokens encoded by the vision tower.",
            stats.num_encode_tokens,
        ),
    ):
        yield _counter(name, text, {"": value})
    text = "Generated tokens per second over the last 10 seconds."
    yield _gauge("output_tokens_per_second", text, load.tokens_per_second)


def _times(stats: EngineStats) -> Iterator[Metric]:
    for name, text, histogram in (
        ("time_to_first_token", "Time from arrival to the first token.", stats.ttft),
        (
            "time_per_output_token",
            "Mean time per output token of an answer after the first one.",
            stats.tpot,
        ),
        ("inter_token_latency", "Time between two tokens of an answer.", stats.itl),
        ("e2e_request", "Time from arrival to the end of a request.", stats.e2e),
        ("input_queue", "Time a prompt waited for a preprocessing thread.", stats.input_queue),
        ("preprocess", "Time of preprocessing, including media decoding.", stats.preprocess),
        ("queue", "Time from preprocessed to first scheduled.", stats.queue),
        ("prefill", "Time from first scheduled to the first token.", stats.prefill),
        ("decode", "Time from the first token to the end of a request.", stats.decode),
    ):
        yield _histogram(name, text, {"": histogram})
    text = "Time of a step, by its most expensive stage: encode, else prefill, else decode."
    yield _histogram("step", text, stats.steps, "stage")
    text = "Time of the vision tower in steps that encode, measured on the slowest rank's device."
    yield _histogram("encode_stage", text, {"": stats.encode_stage})


def _caches(stats: EngineStats, load: EngineLoad) -> Iterator[Metric]:
    used = load.num_blocks - load.num_free_blocks
    unused = load.num_free_blocks - load.num_cached_blocks
    blocks: Numbers = {"used": used, "cached": load.num_cached_blocks, "unused": unused}
    text = "Number of KV cache blocks: used by requests, free with a cached prefix, or unused."
    yield _gauge("kv_cache_blocks", text, blocks, "state")
    text = "Fraction of KV cache blocks used by requests."
    yield _gauge("kv_cache_used_ratio", text, used / max(1, load.num_blocks))
    text = "Fraction of prompt tokens found in the prefix cache since the start."
    yield _gauge("prefix_cache_hit_ratio", text, load.prefix_hit_ratio)
    cache = stats.scheduler.encoder_cache
    held = cache.capacity - cache.room()
    unused = cache.capacity - cache.num_tokens
    tokens: Numbers = {"held": held, "cached": cache.num_tokens - held, "unused": unused}
    text = "Capacity of the encoder cache in image and video tokens, by state."
    yield _gauge("encoder_cache_tokens", text, tokens, "state")
    text = "Fraction of the encoder cache used by requests."
    yield _gauge("encoder_cache_used_ratio", text, held / max(1, cache.capacity))
    text = "Number of encoder cache lookups of images and video units."
    queries = cache.num_found + cache.num_added
    yield _counter("encoder_cache_queries", text, {"": queries})
    text = "Number of encoder cache lookups that were hits."
    yield _counter("encoder_cache_hits", text, {"": cache.num_found})
    text = "Fraction of encoder cache lookups that were hits since the start."
    yield _gauge("encoder_cache_hit_ratio", text, load.encoder_hit_ratio)


def _workers(stats: EngineStats) -> Iterator[Metric]:
    resident = {str(rank): resident_bytes(pid) for rank, pid in stats.group.local_pids.items()}
    text = "Resident memory of a worker process on this machine."
    yield _gauge("worker_resident_memory_bytes", text, resident, "rank")
    memory = stats.group.memory
    text = "Memory of the weights on the workers' devices, over all ranks."
    yield _gauge("weights_memory_bytes", text, memory.weight_bytes)
    text = "Memory of the KV cache on each worker's device."
    size = memory.kv_block_bytes * stats.scheduler.blocks.num_blocks
    yield _gauge("kv_cache_memory_bytes", text, size)
    text = "Number of worker restarts."
    yield _counter("worker_restarts", text, {"": stats.num_restarts})


def resident_bytes(pid: int) -> int:
    """Return the resident set size of a process in bytes; 0 if unknown."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:  # the process ended, or this is not Linux
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _gauge(name: str, text: str, values: float | Numbers, label: str = "") -> Metric:
    family = GaugeMetricFamily(f"octavo_{name}", text, labels=[label] if label else [])
    by_label = values if isinstance(values, Mapping) else {"": values}
    for key, value in by_label.items():
        family.add_metric([key] if label else [], value)
    return family


def _counter(name: str, text: str, values: Numbers, label: str = "") -> Metric:
    family = CounterMetricFamily(f"octavo_{name}", text, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family


def _histogram(name: str, text: str, values: Mapping[str, Histogram], label: str = "") -> Metric:
    family = HistogramMetricFamily(
        f"octavo_{name}_seconds", text, labels=[label] if label else [], unit="seconds"
    )
    for key, histogram in values.items():
        buckets = [
            ("+Inf" if bound == float("inf") else str(bound), float(count))
            for bound, count in histogram.cumulative()
        ]
        family.add_metric([key] if label else [], buckets, histogram.total)
    return family
