"""Load on a server: arrivals, latencies, goodput; and phases of a server's start."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from octavo.benchmarks import plots
from octavo.benchmarks.cli import bench_app
from octavo.benchmarks.compare.engines import RequestTimes
from octavo.benchmarks.report import ttft
from octavo.benchmarks.serve_load import Bounds, Load, LoadPoint, arrivals, load_tables, pack
from octavo.benchmarks.startup import PHASES, ServerProcess, serve_arguments
from octavo.benchmarks.workload import BenchRequest, Media, Vocabulary, Workload
from octavo.engine.client.client import ClientError
from octavo.engine.config.engine_config import EMBEDDED_MODEL

Sent = Iterator[tuple[int, int | None]]
SMALL = {"kv_cache_memory_bytes": 8_000_000, "dtype": "float32"}


def test_arrivals_are_a_poisson_process() -> None:
    due = np.array(arrivals(4.0, 20_001, seed=3))
    gaps = np.diff(due)
    assert due[0] == 0 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # true of an exponential
    assert (gaps > 0.25).mean() == pytest.approx(np.exp(-1), abs=0.01)
    counts = np.histogram(due, bins=np.arange(0, due[-1], 1.0))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.03)


def test_arrivals_by_seed_and_rate() -> None:
    assert arrivals(2.0, 5, 0) == arrivals(2.0, 5, 0) != arrivals(2.0, 5, 1)
    assert arrivals(float("inf"), 3, 0) == [0.0, 0.0, 0.0]
    slow, quick = arrivals(1.0, 5, 0), arrivals(2.0, 5, 0)
    assert [2 * at for at in quick] == pytest.approx(slow)
    assert arrivals(1.0, 0, 0) == []


def test_stalled_server_is_charged_for_requests_that_arrive_meanwhile() -> None:
    """Check against coordinated omission.

    With max_concurrency=1 later requests are sent late, but their latency counts from their
    scheduled arrival.
    """
    stall, step = 0.3, 0.05
    calls: list[float] = []
    began = time.perf_counter()

    def send(request: BenchRequest) -> Sent:
        calls.append(time.perf_counter() - began)
        if len(calls) == 1:
            time.sleep(stall)
        yield 1, 7

    due = [step * i for i in range(4)]
    seen = Load(send, [BenchRequest((1,))] * 4, max_concurrency=1).run(due)
    assert [each.due for each in seen] == due
    assert calls[1] >= stall  # sent late ...
    for each in seen:  # ... and charged for it
        assert ttft(each) >= stall - each.due
    assert all(each.prompt_tokens == 7 for each in seen)


def test_arrivals_do_not_wait_for_answers() -> None:
    all_there = threading.Barrier(3, timeout=20)

    def send(request: BenchRequest) -> Sent:
        all_there.wait()  # passes only with three requests in flight
        yield 1, None

    seen = Load(send, [BenchRequest((1,))] * 3, max_concurrency=None).run([0.0, 0.0, 0.0])
    assert not any(each.error for each in seen)


@pytest.mark.parametrize("most", [1, 2])
def test_max_concurrency(most: int) -> None:
    running, seen_at_once, lock = 0, [], threading.Lock()

    def send(request: BenchRequest) -> Sent:
        nonlocal running
        with lock:
            running += 1
            seen_at_once.append(running)
        time.sleep(0.01)
        with lock:
            running -= 1
        yield 1, None

    Load(send, [BenchRequest((1,))] * 8, max_concurrency=most).run([0.0] * 8)
    assert max(seen_at_once) == most


def test_later_turn_is_due_when_the_previous_one_finished() -> None:
    requests = [BenchRequest((i,), after=i - 1 if i % 2 else None) for i in range(4)]
    order: list[int] = []

    def send(request: BenchRequest) -> Sent:
        time.sleep(0.02)
        order.append(request.prompt_token_ids[0])
        yield 1, None

    seen = Load(send, requests, max_concurrency=None).run([0.0, 0.01])
    assert order.index(0) < order.index(1) and order.index(2) < order.index(3)
    for later in (1, 3):
        assert seen[later].due >= seen[later - 1].times[-1]


def test_rejected_request_counts_as_failed() -> None:
    def send(request: BenchRequest) -> Sent:
        if request.prompt_token_ids == (1,):
            raise ClientError("RESOURCE_EXHAUSTED", "full")
        yield 2, None

    seen = Load(send, [BenchRequest((0,)), BenchRequest((1,))], None).run([0.0, 0.0])
    assert [each.error for each in seen] == ["", "RESOURCE_EXHAUSTED: full"]
    point = LoadPoint.of(1.0, Bounds(ttft_ms=60_000), seen)
    assert (point.report.num_requests, point.report.failed, point.good_share) == (1, 1, 0.5)


def test_internal_error_is_raised() -> None:
    def send(request: BenchRequest) -> Sent:
        raise KeyError("a bug")
        yield

    with pytest.raises(KeyError):
        Load(send, [BenchRequest((0,))], None).run([0.0])


def test_goodput() -> None:
    quick = RequestTimes(1, due=1.0, times=[1.1, 1.3], output_tokens=3)  # TTFT 100, TPOT 100 ms
    late = RequestTimes(1, due=0.0, times=[1.0, 1.1], output_tokens=2)  # 1000, 100
    slow = RequestTimes(1, due=0.0, times=[0.1, 2.0], output_tokens=2)  # 100, 1900
    failed = RequestTimes(1, error="gone")
    seen = [quick, late, slow, failed]
    for bounds, good in (
        (Bounds(200, 200), 1),
        (Bounds(ttft_ms=200), 2),
        (Bounds(tpot_ms=200), 2),
        (Bounds(5000, 5000), 3),
        (Bounds(50, 50), 0),
    ):
        point = LoadPoint.of(2.0, bounds, seen)
        assert point.good_share == good / 4
        assert point.goodput == pytest.approx(good / 2.0)  # the last token arrived after 2 s
    assert LoadPoint.of(2.0, Bounds(), seen).goodput is None


def test_offered_rate_is_reported() -> None:
    """Five requests per second were requested, but fewer arrivals were sampled."""
    seen = [RequestTimes(1, due=due, times=[9.0], output_tokens=1) for due in (0.0, 0.5, 2.0)]
    point = LoadPoint.of(5.0, Bounds(), seen)
    assert point.offered_rate == 1.0 == point.as_dict()["offered_rate"]
    assert LoadPoint.of(5.0, Bounds(), seen[:1]).offered_rate == float("inf")
    asked, offered, _ = next(t for t in load_tables([point]) if len(t.columns) == 3).columns
    assert (*asked.cells, *offered.cells) == ("5", "1.00") and offered.header == "offered"


def test_rates_are_plotted(tmp_path: Path) -> None:
    seen = [RequestTimes(1, due=0.0, times=[1.0, 1.1], output_tokens=2)]
    points = [LoadPoint.of(rate, Bounds(500, None), seen) for rate in (1.0, 2.0, float("inf"))]
    plots.draw_rates(points, "t", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="--request-rate"):
        plots.draw_rates(points[2:], "t", tmp_path / "b.png")


def test_shared_image_is_encoded_once() -> None:
    workload = Workload(4, 1, 3, Media(((56, 56),), (2, 56, 56)), share_media=True)
    packed = pack(workload.requests(Vocabulary.of(EMBEDDED_MODEL)))
    assert len({id(request.images[0]) for request in packed}) == 1
    assert packed[0].images[0][:4] == b"\x89PNG" and len(packed[0].videos[0]) == 2


def test_settings_as_arguments() -> None:
    given = {"overlap_steps": False, "model": None, "max_num_seqs": 3}
    assert serve_arguments(given) == ["--no-overlap-steps", "--max-num-seqs", "3"]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(serve_arguments(SMALL)) as server:
        yield server


def test_start_phases_sum_up_to_the_total(server: ServerProcess) -> None:
    assert list(server.phases) == list(PHASES)
    assert sum(server.phases.values()) == pytest.approx(server.seconds)
    assert all(seconds > 0 for seconds in server.phases.values())
    assert server.memory_bytes > 50e6


def test_bench_serve(server: ServerProcess, tmp_path: Path) -> None:
    """Send images and multi-turn conversations over gRPC, at two rates."""
    file = tmp_path / "a.json"
    options = ["--input-len", "10", "--output-len", "4", "--image-size", "224x224", "--turns", "2"]
    options += ["--request-rate", "20,inf", "--num-prompts", "3", "--goodput-ttft-ms", "60000"]
    options += ["--server", server.address, "--json", str(file)]
    done = CliRunner().invoke(bench_app, ["serve", *options])
    assert done.exit_code == 0, done.stderr
    runs = json.loads(file.read_text())["runs"]
    assert [run["request_rate"] for run in runs] == [20.0, None]  # JSON has no infinity
    for run in runs:
        assert (run["num_requests"], run["failed"], run["output_tokens"]) == (6, 0, 24)
        assert run["prompt_tokens"] == 3 * (10 + 2 + 64) + 3 * (10 + 2 + 64 + 4 + 10)
        assert run["goodput"] == pytest.approx(run["requests_per_second"])
    assert "100%" in done.stdout
