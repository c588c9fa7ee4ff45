"""Prometheus metrics of one engine: its plain numbers as metric families, made when they are asked
for. Each engine has a registry of its own, so that several in one process do not meet."""

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
    """The text that a Prometheus server reads, of `CONTENT_TYPE`."""
    return generate_latest(metrics_registry(stats))


def metrics_registry(stats: EngineStats) -> CollectorRegistry:
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
    yield _gauge("requests_running", "Requests that have begun and are not done.", load.num_running)
    yield _gauge(
        "requests_waiting",
        "Admitted requests that have not begun, or were preempted; n answers are n.",
        load.num_waiting,
    )
    yield _gauge(
        "requests_preparing",
        "Requests whose input is being made ready, or that no step has seen: workers are away.",
        load.num_preparing,
    )
    ends = {"stop": 0, "length": 0, "abort": 0, "error": 0, "refused": 0, **stats.ends}
    yield _counter("requests", "Requests that are over, by how they ended.", ends, "finish_reason")
    errors = {"INTERNAL": 0, **stats.errors}
    text = "Requests that were refused or failed, by code."
    yield _counter("request_errors", text, errors, "code")
    text = "Times a running request lost its blocks to a more urgent one."
    yield _counter("preemptions", text, {"": stats.num_preemptions})


def _connections(stats: EngineStats) -> Iterator[Metric]:
    closed = {**dict.fromkeys(CONNECTION_REASONS, 0), **stats.closed_connections}
    text = "Connections to the HTTP and metrics servers that were closed, by reason."
    yield _counter("connections_closed", text, closed, "reason")


def _tokens(stats: EngineStats, load: EngineLoad) -> Iterator[Metric]:
    for name, text, value in (
        ("prompt_tokens", "Tokens of the prompts that have begun.", stats.num_prompt_tokens),
        ("cached_prompt_tokens", "Of these, found in the KV cache.", stats.num_cached_tokens),
        ("output_tokens", "Tokens of answers.", stats.num_output_tokens),
        (
            "prefill_tokens",
            "Tokens computed of prompts, and again of what was preempted.",
            stats.num_prefill_tokens,
        ),
        ("decode_tokens", "Tokens computed one by one of answers.", stats.num_decode_tokens),
        (
            "encode_tokens",
            "Image and video tokens that the vision tower made.",
            stats.num_encode_tokens,
        ),
    ):
        yield _counter(name, text, {"": value})
    text = "Tokens of answers a second, over the last ten seconds."
    yield _gauge("output_tokens_per_second", text, load.tokens_per_second)


def _times(stats: EngineStats) -> Iterator[Metric]:
    for name, text, histogram in (
        ("time_to_first_token", "From a request's arrival to its first token.", stats.ttft),
        (
            "time_per_output_token",
            "An answer's time after its first token, per token.",
            stats.tpot,
        ),
        ("inter_token_latency", "Between two tokens of an answer.", stats.itl),
        ("e2e_request", "From a request's arrival to its end.", stats.e2e),
        ("input_queue", "A prompt waited for a thread to make it ready.", stats.input_queue),
        ("preprocess", "A prompt was made ready, media decoded.", stats.preprocess),
        ("queue", "A request was ready and waited for its first step.", stats.queue),
        ("prefill", "From a request's first step to its first token.", stats.prefill),
        ("decode", "From a request's first token to its end.", stats.decode),
    ):
        yield _histogram(name, text, {"": histogram})
    text = "A step of the workers: one that encodes, else one that computes prompts, else decodes."
    yield _histogram("step", text, stats.steps, "stage")
    text = "In steps that encode the vision tower alone, as the slowest rank's device measured it; "
    text += "the rest is the decoder's, which computes prompts and answers in one batch."
    yield _histogram("encode_stage", text, {"": stats.encode_stage})


def _caches(stats: EngineStats, load: EngineLoad) -> Iterator[Metric]:
    used = load.num_blocks - load.num_free_blocks
    unused = load.num_free_blocks - load.num_cached_blocks
    blocks: Numbers = {"used": used, "cached": load.num_cached_blocks, "unused": unused}
    text = "Blocks of the KV cache: held by requests, free with a prefix to be found, or unused."
    yield _gauge("kv_cache_blocks", text, blocks, "state")
    text = "Share of the KV cache that requests hold."
    yield _gauge("kv_cache_used_ratio", text, used / max(1, load.num_blocks))
    text = "Prompt tokens found in the KV cache, of all since the start."
    yield _gauge("prefix_cache_hit_ratio", text, load.prefix_hit_ratio)
    cache = stats.scheduler.encoder_cache
    held = cache.capacity - cache.room()
    unused = cache.capacity - cache.num_tokens
    tokens: Numbers = {"held": held, "cached": cache.num_tokens - held, "unused": unused}
    text = "Image and video tokens that the encoder cache has room for, by state."
    yield _gauge("encoder_cache_tokens", text, tokens, "state")
    text = "Share of the encoder cache that requests hold."
    yield _gauge("encoder_cache_used_ratio", text, held / max(1, cache.capacity))
    text = "Images and pieces of videos that a request came to need, and those encoded already."
    asked = cache.num_found + cache.num_added
    yield _counter("encoder_cache_queries", text, {"": asked})
    text = "Of octavo_encoder_cache_queries_total, those that were encoded already."
    yield _counter("encoder_cache_hits", text, {"": cache.num_found})
    yield _gauge("encoder_cache_hit_ratio", "The same as a share.", load.encoder_hit_ratio)


def _workers(stats: EngineStats) -> Iterator[Metric]:
    resident = {str(rank): resident_bytes(pid) for rank, pid in stats.group.local_pids.items()}
    text = "Main memory that a worker's process holds, where it runs on this machine."
    yield _gauge("worker_resident_memory_bytes", text, resident, "rank")
    memory = stats.group.memory
    text = "Weights on the workers' devices, of all ranks."
    yield _gauge("weights_memory_bytes", text, memory.weight_bytes)
    text = "The KV cache on each worker's device."
    size = memory.kv_block_bytes * stats.scheduler.blocks.num_blocks
    yield _gauge("kv_cache_memory_bytes", text, size)
    text = "Times the workers ended and were started anew."
    yield _counter("worker_restarts", text, {"": stats.num_restarts})


def resident_bytes(pid: int) -> int:
    """What a process holds of main memory; 0 where that is not to be known."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:  # it ended, or this is not Linux
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
