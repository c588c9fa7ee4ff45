"""What an engine tells of itself, as `prometheus_client`'s own parser reads it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import octavo
from octavo import metrics_text
from octavo.benchmarks.fakes.simulated_worker import Simulation, make_config
from octavo.engine.errors import DuplicateRequest, EngineDead, InputError, code_of
from octavo.engine.input.processor import InputTimes, ProcessedInput
from octavo.engine.observability.prometheus import CONTENT_TYPE
from octavo.engine.observability.request_log import RequestRecord
from octavo.engine.observability.stats import EngineStats
from octavo.engine.outputs import OutputDelta, Usage
from octavo.engine.server.errors import error_info
from octavo.engine.server.grpc_api.server import warm_up
from octavo.engine.server.metrics_server import serving_metrics
from octavo.scheduler.errors import AdmissionError, QueueFull
from octavo.scheduler.request import Request
from octavo.scheduler.step import StepPlan

BLOCK_BYTES = 32768  # of the embedded model in float32, 16 tokens
GREEDY = octavo.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def read(stats: EngineStats) -> Counter[str]:
    """Each sample by its name and labels, without octavo_: `requests_total{finish_reason=stop}`."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics_text(stats).decode()):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            name = sample.name.removeprefix("octavo_") + (f"{{{labels}}}" if labels else "")
            assert sample.name.startswith("octavo_") and name not in found
            found[name] = sample.value  # type: ignore[assignment]  # as float
    return found


class Measured:
    """What changed of an engine's metrics inside a with block."""

    def __init__(self, engine: octavo.AsyncLLM) -> None:
        self._stats = engine.engine.stats
        self._before = read(self._stats)

    def __getitem__(self, name: str) -> float:
        after = read(self._stats)
        assert name in after, f"{name} is none of {sorted(after)}"
        return after[name] - self._before[name]


@pytest.fixture(scope="module")
def engine() -> Iterator[octavo.AsyncLLM]:
    """Two requests fit in its blocks until they have grown."""
    with octavo.AsyncLLM(
        dtype="float32",
        max_model_len=160,
        max_num_seqs=2,
        max_queue_len=2,
        kv_cache_memory_bytes=14 * BLOCK_BYTES,
    ) as engine:
        yield engine


def ask(engine: octavo.AsyncLLM, prompt: Any, params: Any = GREEDY, **more: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [delta async for delta in engine.generate(prompt, params, **more)]

    return asyncio.run(collect())


def ids(*token_ids: int) -> dict[str, Any]:
    return {"prompt_token_ids": list(token_ids)}


def test_what_the_issue_names_is_there(engine: octavo.AsyncLLM) -> None:
    names = set(read(engine.engine.stats))
    for histogram in (
        "time_to_first_token",
        "time_per_output_token",
        "inter_token_latency",
        "e2e_request",
        "input_queue",
        "preprocess",
        "queue",
        "prefill",
        "decode",
    ):
        ends = ("_seconds_count", "_seconds_sum", "_seconds_bucket{le=+Inf}")
        assert {histogram + end for end in ends} <= names
    for stage in ("encode", "prefill", "decode"):
        assert f"step_seconds_count{{stage={stage}}}" in names
    assert names >= {
        "requests_running",
        "requests_waiting",
        "prompt_tokens_total",
        "cached_prompt_tokens_total",
        "output_tokens_total",
        "kv_cache_used_ratio",
        "prefix_cache_hit_ratio",
        "encoder_cache_used_ratio",
        "encoder_cache_hit_ratio",
        "preemptions_total",
        "request_errors_total{code=INTERNAL}",
        "worker_resident_memory_bytes{rank=0}",
        "worker_restarts_total",
    }


def test_known_requests_add_up(engine: octavo.AsyncLLM) -> None:
    seen = Measured(engine)
    ask(engine, ids(*range(40, 80)))
    deltas = ask(engine, ids(*range(40, 80)))
    assert deltas[-1].usage.cached_tokens == 32
    assert seen["requests_total{finish_reason=length}"] == 2
    assert (seen["prompt_tokens_total"], seen["cached_prompt_tokens_total"]) == (80, 32)
    assert (seen["output_tokens_total"], seen["decode_tokens_total"]) == (16, 14)
    assert seen["prefill_tokens_total"] == 40 + 8
    assert seen["step_seconds_count{stage=prefill}"] == 2
    assert seen["step_seconds_count{stage=decode}"] == 14
    assert seen["step_seconds_count{stage=encode}"] == 0
    assert seen["inter_token_latency_seconds_count"] == 14
    for once in ("time_to_first_token", "time_per_output_token", "e2e_request", "queue", "prefill"):
        assert seen[f"{once}_seconds_count"] == seen[f"{once}_seconds_bucket{{le=+Inf}}"] == 2
    load = engine.engine.stats.load()
    assert (load.num_running, load.num_waiting, load.num_preparing) == (0, 0, 0)
    assert load.num_free_blocks == load.num_blocks == engine.engine.num_blocks
    assert load.num_cached_blocks > 0 and 0 < load.prefix_hit_ratio < 1


def test_sums_of_times_are_consistent(engine: octavo.AsyncLLM) -> None:
    """What a request's stages took is what it took; and what its last delta says."""
    seen = Measured(engine)
    picture = Image.fromarray(np.full((56, 84, 3), 77, np.uint8))
    message = {"role": "user", "content": [{"type": "image", "image": picture}]}
    answers = [ask(engine, {"messages": [message]}) for _ in range(2)]
    stages = ("input_queue", "preprocess", "queue", "prefill")
    to_first = sum(seen[f"{stage}_seconds_sum"] for stage in stages)
    assert to_first == pytest.approx(seen["time_to_first_token_seconds_sum"])
    decode, total = seen["decode_seconds_sum"], seen["e2e_request_seconds_sum"]
    assert to_first + decode == pytest.approx(total)
    assert seen["inter_token_latency_seconds_sum"] == pytest.approx(decode)
    assert seen["time_per_output_token_seconds_sum"] * 7 == pytest.approx(decode)
    ends = [deltas[-1].times for deltas in answers]
    assert sum(times.total_s for times in ends) == pytest.approx(total)
    assert sum(times.ttft_s for times in ends) == pytest.approx(to_first)
    assert all(delta.times is None for deltas in answers for delta in deltas[:-1])
    assert seen["preprocess_seconds_sum"] > 0
    steps = sum(seen[f"step_seconds_sum{{stage={s}}}"] for s in ("encode", "prefill", "decode"))
    assert 0 < steps < total
    # The picture was encoded once; the second prompt found most of itself, or at least the picture.
    assert seen["step_seconds_count{stage=encode}"] == seen["encode_stage_seconds_count"] == 1
    assert 0 < seen["encode_stage_seconds_sum"] < seen["step_seconds_sum{stage=encode}"]
    assert seen["encode_tokens_total"] == answers[0][0].media[0].num_tokens
    assert seen["cached_prompt_tokens_total"] + seen["encoder_cache_hits_total"] > 0


@pytest.mark.parametrize(
    "error",
    [
        InputError("prompt", "wrong"),
        AdmissionError("prompt: too long"),
        QueueFull("full"),
        DuplicateRequest("request_id: in use"),
        EngineDead("it crashed"),
        RuntimeError("a fault"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_caller_the_log_and_the_metrics_have_one_code(
    engine: octavo.AsyncLLM, error: Exception
) -> None:
    seen, code = Measured(engine), error_info(error).code
    before = engine.engine.stats.errors[code]
    with contextlib.suppress(type(error)), RequestRecord("a", engine.engine.stats):
        raise error
    assert engine.engine.stats.errors[code] == before + 1
    how = "error" if code in ("INTERNAL", "UNAVAILABLE") else "refused"
    assert seen[f"requests_total{{finish_reason={how}}}"] == 1
    assert code_of(error) == code


def test_awarm_up_is_not_counted() -> None:
    with octavo.AsyncLLM(dtype="float32", max_model_len=64) as engine:
        fresh = read(engine.engine.stats)
        asyncio.run(warm_up(engine))
        assert engine.engine.scheduler.state.blocks.num_free == engine.engine.num_blocks
        after = read(engine.engine.stats)
        after["worker_resident_memory_bytes{rank=0}"] = fresh[
            "worker_resident_memory_bytes{rank=0}"
        ]
        assert after == fresh
        ask(engine, ids(1, 2, 3))
        assert read(engine.engine.stats)["requests_total{finish_reason=length}"] == 1


def test_errors_are_counted_by_code(engine: octavo.AsyncLLM) -> None:
    seen = Measured(engine)
    with pytest.raises(InputError):
        ask(engine, {"messages": [{"role": "user", "content": [{"type": "sound"}]}]})
    with pytest.raises(ValueError, match="max_model_len"):
        ask(engine, ids(*[1] * 200))
    late = ask(engine, ids(1, 2, 3), timeout_s=0.0)
    assert late[-1].error.startswith("DEADLINE_EXCEEDED")
    assert seen["requests_total{finish_reason=refused}"] == 2
    assert seen["requests_total{finish_reason=error}"] == 1
    assert seen["request_errors_total{code=INVALID_ARGUMENT}"] == 2
    assert seen["request_errors_total{code=DEADLINE_EXCEEDED}"] == 1


async def begun(engine: octavo.AsyncLLM, name: str) -> Any:
    stream = engine.generate(ids(5, 6), GREEDY_LONG, request_id=name)
    await anext(stream)
    return stream


GREEDY_LONG = octavo.SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)


def test_duplicates_full_queues_and_readers_that_leave(engine: octavo.AsyncLLM) -> None:
    async def scene() -> None:
        first = await begun(engine, "a")
        load = engine.engine.stats.load()
        assert load.num_running == 1
        with pytest.raises(DuplicateRequest):
            await begun(engine, "a")
        others = [engine.generate(ids(7), GREEDY_LONG) for _ in range(3)]
        tasks = [asyncio.ensure_future(anext(each)) for each in others]
        await asyncio.sleep(0)  # all places are taken
        with pytest.raises(QueueFull):
            await begun(engine, "b")
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in (first, *others):
            with contextlib.suppress(RuntimeError):
                await stream.aclose()
        while engine.engine.has_requests or engine.engine.has_steps:
            await asyncio.sleep(0.01)

    seen = Measured(engine)
    asyncio.run(scene())
    assert seen["request_errors_total{code=ALREADY_EXISTS}"] == 1
    assert seen["request_errors_total{code=RESOURCE_EXHAUSTED}"] == 1
    assert seen["requests_total{finish_reason=refused}"] == 2
    assert seen["requests_total{finish_reason=abort}"] == 4
    assert engine.engine.stats.load().num_preparing == 0


def test_preemptions_are_counted_and_engines_are_apart(engine: octavo.AsyncLLM) -> None:
    """Two answers outgrow the blocks; another engine's numbers stay as they are."""

    async def both() -> list[list[Any]]:
        async def one(first: int) -> list[Any]:
            params = octavo.SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
            prompt = ids(*range(first, first + 30))
            return [delta async for delta in engine.generate(prompt, params)]

        return await asyncio.gather(one(100), one(150))

    with octavo.LLM(dtype="float32", max_model_len=64) as other:
        other.generate(ids(1, 2, 3), GREEDY)
        before = read(other.engine.stats)
        seen = Measured(engine)
        answers = asyncio.run(both())
        after = read(other.engine.stats)
        for moving in ("worker_resident_memory_bytes{rank=0}", "output_tokens_per_second"):
            del before[moving]
        assert {name: after[name] for name in before} == dict(before)
    assert [deltas[-1].usage.output_tokens for deltas in answers] == [120, 120]
    assert seen["preemptions_total"] >= 1
    assert seen["output_tokens_total"] == 240 and seen["time_to_first_token_seconds_count"] == 2
    assert seen["prefill_tokens_total"] > 60, "what was preempted was computed again"


def test_read_while_it_runs(engine: octavo.AsyncLLM) -> None:
    """From another thread, all the time: counters never fall."""
    over = threading.Event()
    reads: list[Counter[str]] = []

    def scrape() -> None:
        while not over.is_set():
            reads.append(read(engine.engine.stats))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        ask(engine, ids(9, 9, 9), octavo.SamplingParams(n=2, max_tokens=100, ignore_eos=True))
    finally:
        over.set()
        thread.join()
    assert max(each["requests_running"] for each in reads) >= 1
    assert max(each["kv_cache_used_ratio"] for each in reads) > 0
    for name in ("output_tokens_total", "inter_token_latency_seconds_count"):
        values = [each[name] for each in reads]
        assert values == sorted(values) and values[-1] > values[0]


def test_workers_memory_and_restarts(engine: octavo.AsyncLLM) -> None:
    seen = Measured(engine)
    text = Path(f"/proc/{engine.worker_pids[0]}/status").read_text()
    resident = int(text.partition("VmRSS:")[2].split()[0]) * 1024
    told = read(engine.engine.stats)["worker_resident_memory_bytes{rank=0}"]
    assert told == pytest.approx(resident, rel=0.2) and told > 1e7
    os.kill(engine.worker_pids[0], signal.SIGKILL)
    deltas = ask(engine, ids(1, 2, 3))
    assert sum(len(delta.token_ids) for delta in deltas) == 8
    assert seen["worker_restarts_total"] == 1
    assert seen["output_tokens_total"] == 8 and seen["time_to_first_token_seconds_count"] == 1


def test_served_over_http(engine: octavo.AsyncLLM) -> None:
    stats = engine.engine.stats
    with serving_metrics(stats, "127.0.0.1", 0) as address:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            assert reply.headers["Content-Type"] == CONTENT_TYPE
            assert b"octavo_requests_running 0.0" in reply.read()
        port = int(address.rpartition(":")[2])
        with (
            pytest.raises(OSError, match=f"--metrics-port {port}.*in use"),
            serving_metrics(stats, "127.0.0.1", port),
        ):
            pass
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://{address}/metrics", timeout=10)
    with serving_metrics(stats, "127.0.0.1", None) as nothing:
        assert nothing == ""


class Told:
    """Stats that are told of events by hand, on a clock that stands still."""

    def __init__(self, num_answers: int = 1) -> None:
        self.now = 100.0
        self.scheduler = Simulation(make_config()).scheduler
        self.stats = EngineStats(self.scheduler, None, lambda: self.now)  # type: ignore[arg-type]
        prompt = octavo.SamplingParams()
        tokens = ProcessedInput((), (), (), (), 0, times=InputTimes(1.0, 2.0), arrived_at=90.0)  # type: ignore[arg-type]
        names = ["a", *(f"a[{index}]" for index in range(1, num_answers))]
        self.requests = [Request(name, [1, 2, 3], prompt) for name in names]  # type: ignore[arg-type]
        self.stats.add("a", self.requests, tokens, 99.0)

    def take(self, seconds: float, *deltas: OutputDelta) -> list[OutputDelta]:
        self.now += seconds
        for delta in deltas:
            self.requests[delta.index].token_ids.extend(delta.token_ids)
        return self.stats.take([*deltas])


def token(index: int = 0, reason: str | None = None, usage: Usage | None = None) -> OutputDelta:
    return OutputDelta("a", index, "x", (7,), reason, usage)


def plan(step_id: int, *names: str, num_decode: int = 0) -> StepPlan:
    counts = (1,) * len(names)
    return StepPlan(
        step_id, names, counts, counts, (), (), started=names, num_decode_tokens=num_decode
    )


def test_two_answers_to_one_prompt() -> None:
    told = Told(num_answers=2)
    told.stats.plan(plan(1, "a"), 95.0)
    told.take(0.0, token(0))  # at 100
    told.take(1.0, token(0), token(1))
    told.take(2.0, token(0, "stop"), token(1))
    (last,) = told.take(4.0, token(1, "length", Usage(3, 6)))
    stats = told.stats
    assert (stats.itl.count, stats.itl.total) == (4, 1.0 + 2.0 + 2.0 + 4.0)
    assert (stats.tpot.count, stats.tpot.total) == (2, 3.0 / 2 + 6.0 / 2)
    assert (stats.ttft.count, stats.ttft.total) == (1, 10.0)
    assert stats.num_output_tokens == 6 and stats.ends == {"length": 1}
    times = last.times
    assert times is not None and times.total_s == 17.0 and times.decode_s == 7.0
    assert (times.preprocess_s, times.queue_s, times.prefill_s) == (3.0, 2.0, 5.0)


def test_steps_that_overlap_share_no_time() -> None:
    """The second step is planned while the first runs: its time begins where that one's ends."""
    told = Told()
    told.stats.plan(plan(1, "a"), 100.0)
    told.stats.plan(plan(2, "a", num_decode=1), 100.5)
    told.stats.done(103.0)
    told.stats.done(104.0)
    assert told.stats.steps["prefill"].total == 3.0 and told.stats.steps["decode"].total == 1.0
    told.stats.plan(plan(3, "a", num_decode=1), 105.0)
    told.stats.reset_after_worker_restart(1)
    told.stats.plan(plan(4, "a", num_decode=1), 110.0)
    told.stats.done(112.0)
    assert told.stats.steps["decode"].total == 3.0, "a lost step has no time"
    assert told.stats.num_restarts == 1 and told.stats.queue.count == 1


def test_tokens_a_second() -> None:
    told = Told()
    for _ in range(20):  # two a second
        told.take(0.5, token())
    assert told.stats.load().tokens_per_second == pytest.approx(1.9, abs=0.11)
    told.now += 5
    assert told.stats.load().tokens_per_second == pytest.approx(1.0, abs=0.11)
    told.now += 20
    assert told.stats.load().tokens_per_second == 0
