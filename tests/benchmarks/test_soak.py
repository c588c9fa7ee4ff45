"""The soak: how it judges what it sampled, and short runs of it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest

from octavo.benchmarks.soak.clients import CASES
from octavo.benchmarks.soak.report import SoakReport
from octavo.benchmarks.soak.run import Soak, SoakOptions
from octavo.benchmarks.soak.samples import ProcessSample, Sample, slope, take_sample

MB = 1_000_000
SERVER = ProcessSample(1, "server", 100 * MB, 90 * MB, 20, 10)
WORKER = ProcessSample(2, "worker", 200 * MB, 90 * MB, 10, 15)
DECODER = ProcessSample(3, "decoder", 60 * MB, 30 * MB, 6, 1)


def sample(minute: float, *processes: ProcessSample, **metrics: float) -> Sample:
    return Sample(60 * minute, processes or (SERVER, WORKER, DECODER), metrics)


def report(samples: list[Sample], last: Sample | None = None, **failed: int) -> SoakReport:
    counts = Counter({f"failed {kind}": number for kind, number in failed.items()})
    censuses = (samples[0], last or samples[0])
    return SoakReport(tuple(samples), censuses, counts, [], (0.0, 600.0), None)


def test_slope_is_the_least_squares_line() -> None:
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2)
    assert slope([(0.0, 0.0), (1.0, 4.0), (2.0, 2.0)]) == pytest.approx(1)
    assert slope([(1.0, 5.0)]) == slope([]) == slope([(1.0, 5.0), (1.0, 6.0)]) == 0


def test_a_growing_worker_is_a_problem() -> None:
    grown = [
        sample(n, SERVER, replace(WORKER, resident=WORKER.resident + n * MB // 2))
        for n in range(10)
    ]
    assert report(grown).growth == pytest.approx(0.5)
    assert report(grown).problems() == ["resident memory grows by 0.50 MB/min"]


def test_the_number_of_decoders_is_not_growth() -> None:
    more = [sample(n, SERVER, WORKER, *[DECODER] * (1 + n // 5)) for n in range(10)]
    assert report(more).growth == 0
    assert report(more, last=more[-1]).problems() == []


@pytest.mark.parametrize(
    ("last", "text"),
    [
        (sample(9, replace(SERVER, num_descriptors=40), WORKER), "40 descriptors"),
        (sample(9, replace(SERVER, num_threads=20), WORKER), "20 threads"),
        (sample(9, SERVER, WORKER, *[DECODER] * 4), "4 processes"),
        (sample(9, **{'octavo_kv_cache_blocks{state="used"}': 2.0}), "is 2 on the idle server"),
    ],
)
def test_what_an_idle_server_still_holds_is_a_problem(last: Sample, text: str) -> None:
    found = report([sample(n) for n in range(10)], last).problems()
    assert any(text in problem for problem in found), found


def test_a_failed_good_request_is_a_problem() -> None:
    steady = [sample(n) for n in range(10)]
    assert report(steady).problems() == []
    assert report(steady, good=1).problems() == ["1 cases of kind 'good' failed"]


def test_processes_are_sampled_by_role() -> None:
    found = take_sample(os.getpid(), 0.0, {})
    assert found.count("server") == 1  # others are helpers of tests that ran before
    assert found.resident("server") > 10 * MB and found.num_descriptors("server") > 2


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.kind for case in CASES} == {"good", "bad", "leaving"}


def run(minutes: float, rate: float, cases: tuple[str, ...] = ()) -> SoakReport:
    options = SoakOptions(
        minutes, 0.0, minutes / 2, rate, num_processes=1, num_first_images=0, cases=cases
    )
    return Soak(options, print).run()


def lost(found: SoakReport) -> list[str]:
    """Its problems, but for growth: a short run is all warm-up."""
    return [problem for problem in found.problems() if "MB/min" not in problem]


def test_a_few_seconds_of_the_soak_lose_nothing() -> None:
    cases = ("chat_text", "grpc_text", "bad_fields", "bad_grpc", "leave_stream", "watching")
    found = run(0.1, 8, cases)
    assert not lost(found), found.as_text()
    assert found.counts.total() > 5


@pytest.mark.lesson("L13")
@pytest.mark.slow
def test_two_minutes_of_all_cases_lose_nothing() -> None:
    found = run(2, 8)
    assert not lost(found), found.as_text()
    assert len(found.counts) == len(CASES), found.counts
