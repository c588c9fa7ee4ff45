"""The scheduler against a simulated worker: tokens, blocks, encode units, preemption, limits."""

from dataclasses import replace

import pytest

from octavo.benchmarks.fakes.simulated_worker import (
    Simulation,
    make_config,
    make_request,
    naive_output,
)
from octavo.scheduler.errors import AdmissionError, RequestError
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.step import StepPlan, StepResult

CAT, DOG, OWL = b"cat" * 11, b"dog" * 11, b"owl" * 11
ROW_ERROR = RequestError("INTERNAL", "its row")


def run(requests: list[Request], **settings: int) -> Simulation:
    simulation = Simulation(make_config(**settings))
    for request in requests:
        simulation.scheduler.add(request)
    simulation.run()
    return simulation


def test_a_prompt_is_one_step_and_each_token_another() -> None:
    simulation = Simulation(make_config())
    simulation.scheduler.add(make_request("a", 10, max_tokens=3))
    counts = []
    while (plan := simulation.step()) is not None:
        counts.append(plan.num_scheduled_tokens)
    assert counts == [(10,), (1,), (1,)]
    assert simulation.ended["a"].status is RequestStatus.FINISHED_LENGTH


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 16, 40])
def test_chunked_is_whole(budget: int) -> None:
    requests = [make_request(name, size) for name, size in (("a", 9), ("b", 17), ("c", 2))]
    simulation = run(requests, max_num_batched_tokens=budget)
    for request in requests:
        assert simulation.outputs[request.request_id] == naive_output(request, 4)


def test_running_requests_go_before_waiting_ones() -> None:
    simulation = Simulation(make_config(max_num_batched_tokens=6))
    simulation.scheduler.add(make_request("old", 4))
    simulation.step()
    simulation.scheduler.add(make_request("new", 20))
    plan = simulation.step()
    assert plan is not None
    assert plan.request_ids == ("old", "new")
    assert plan.num_scheduled_tokens == (1, 5)


def test_max_num_seqs_bounds_what_runs() -> None:
    simulation = Simulation(make_config(max_num_seqs=2))
    for name in "abcd":
        simulation.scheduler.add(make_request(name, 3))
    plan = simulation.step()
    assert plan is not None and plan.request_ids == ("a", "b")
    simulation.run()
    assert set(simulation.ended) == set("abcd")


def test_preempted_requests_resume_with_the_same_tokens() -> None:
    requests = [make_request(name, 14, max_tokens=30) for name in "abcd"]
    simulation = run(requests, num_blocks=20)
    assert simulation.preemptions > 0
    for request in requests:
        assert simulation.outputs[request.request_id] == naive_output(request, 30)


def test_the_newest_is_preempted_and_resumes_first() -> None:
    simulation = Simulation(make_config(num_blocks=10, max_num_batched_tokens=32))
    for name in "ab":
        simulation.scheduler.add(make_request(name, 14, max_tokens=12))
    simulation.step()
    simulation.scheduler.add(make_request("c", 2))
    while not simulation.preemptions:
        plan = simulation.step()
        assert plan is not None
    assert plan.preempted == ("b",)
    assert [request.request_id for request in simulation.scheduler.waiting] == ["b", "c"]
    assert simulation.scheduler.requests["b"].status is RequestStatus.PREEMPTED
    simulation.run()


def test_a_chunk_is_cut_before_a_unit_that_does_not_fit() -> None:
    request = make_request("a", 20, (2, 6, CAT), (10, 6, DOG))
    simulation = Simulation(make_config(max_encode_tokens=8, max_num_batched_tokens=40))
    simulation.scheduler.add(request)
    first = simulation.step()
    assert first is not None and first.num_scheduled_tokens == (10,)
    assert [p.unit.media_hash for p in first.encode] == [CAT]
    second = simulation.step()
    assert second is not None and second.num_scheduled_tokens == (10,)
    assert [p.unit.media_hash for p in second.encode] == [DOG]
    simulation.run()
    assert simulation.outputs["a"] == naive_output(request, 4)


def test_an_image_in_two_requests_is_encoded_once() -> None:
    requests = [make_request(name, 12, (3, 6, CAT)) for name in "ab"]
    simulation = run(requests, max_num_batched_tokens=5)
    assert simulation.worker.encoded == 6
    late = make_request("late", 12, (1, 6, CAT))
    simulation.scheduler.add(late)
    simulation.run()
    assert simulation.worker.encoded == 6
    assert simulation.outputs["late"] == naive_output(late, 4)


def test_one_image_twice_in_a_prompt() -> None:
    request = make_request("a", 30, (1, 8, CAT), (12, 8, CAT), (21, 8, DOG))
    for budget in (1, 7, 40):
        again = replace(request, units=request.units, token_ids=request.prompt_token_ids[:])
        simulation = run([again], max_num_batched_tokens=budget, encoder_cache_tokens=8)
        assert simulation.outputs["a"] == naive_output(request, 4)


def test_what_is_evicted_is_reported_to_the_workers() -> None:
    simulation = run(
        [make_request(str(i), 12, (2, 8, bytes([i]) * 32)) for i in range(9)],
        encoder_cache_tokens=24,
    )
    assert len(simulation.worker.embeddings) <= 3


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request("a", 0), "no tokens"),
        (make_request("a", 64), "max_model_len is 64"),
        (make_request("a", 40, (1, 17, CAT)), "max_encode_tokens=16"),
    ],
)
def test_what_can_never_run_is_rejected(request_: Request, words: str) -> None:
    scheduler = Scheduler(make_config())
    with pytest.raises(AdmissionError, match=words):
        scheduler.add(request_)
    assert scheduler.schedule() is None


def test_max_tokens_is_bounded_by_the_room_there_is() -> None:
    request = make_request("a", 60, max_tokens=1000)
    simulation = run([request])
    assert len(simulation.outputs["a"]) == 4
    assert simulation.ended["a"].status is RequestStatus.FINISHED_LENGTH


def test_abort_frees_at_once_wherever_it_is() -> None:
    simulation = Simulation(make_config(max_num_seqs=1, max_num_batched_tokens=5))
    for name in "abc":
        simulation.scheduler.add(make_request(name, 12, (2, 6, name.encode() * 32)))
    simulation.step()
    for name in "ab":  # one in the middle of its image, one that waits
        simulation.finish(name)
        simulation.scheduler.check_integrity()
    assert simulation.scheduler.blocks.num_free == 16
    simulation.run()
    assert simulation.ended["c"].status is RequestStatus.FINISHED_LENGTH
    assert simulation.scheduler.finish("a", RequestStatus.FINISHED_ABORTED) is None


@pytest.mark.lesson("L06")
def test_encoder_deadlock() -> None:
    """Many requests, each with two images of which the cache holds one and a half."""
    requests = [
        make_request(f"r{i}", 30, (2, 12, bytes([i]) * 32), (16, 12, bytes([99 - i]) * 32))
        for i in range(12)
    ]
    for budget in (3, 9, 16, 40):
        fresh = [replace(r, token_ids=r.prompt_token_ids[:]) for r in requests]
        simulation = run(
            fresh, num_blocks=200, max_num_batched_tokens=budget, encoder_cache_tokens=18
        )
        for request in requests:
            assert simulation.outputs[request.request_id] == naive_output(request, 4)


@pytest.mark.lesson("L06")
def test_encoder_deadlock_the_watchdog_fails_the_head_aloud() -> None:
    simulation = Simulation(make_config(max_empty_steps=7))
    simulation.scheduler.add(make_request("a", 8))
    simulation.scheduler.add(make_request("b", 8))
    blocks = simulation.scheduler.blocks
    held, blocks._unused = blocks._unused, []  # as if blocks had leaked: nothing can start
    for _ in range(7):
        plan = simulation.scheduler.schedule()
        assert plan is not None and not plan.request_ids
        updates = simulation.scheduler.update(StepResult(plan.step_id, ()))
    assert [(u.request_id, u.status) for u in updates] == [("a", RequestStatus.FINISHED_ERROR)]
    assert str(updates[0].error) == (
        "RESOURCE_EXHAUSTED: nothing could run in 7 steps; the request is waiting, 0 of 8 tokens "
        "computed; 2 blocks needed, 0 of 16 free; 24 of 24 image tokens available; 0 running, "
        "2 waiting"
    )
    blocks._unused = held
    simulation.run()
    assert simulation.ended["b"].status is RequestStatus.FINISHED_LENGTH


@pytest.mark.lesson("L07")
def test_mirrored_cache_a_miss_is_planned_again() -> None:
    simulation = Simulation(make_config(max_num_batched_tokens=40))
    request, other = make_request("a", 12, (2, 6, CAT)), make_request("b", 9)
    simulation.scheduler.add(request)
    simulation.scheduler.add(other)
    original = simulation.worker._encode
    lost = 0

    def forget(plan: StepPlan, config: object) -> None:
        nonlocal lost
        original(plan, config)  # type: ignore[arg-type]
        if plan.encode and lost < 2:
            lost += 1
            simulation.worker.embeddings.clear()

    simulation.worker._encode = forget  # type: ignore[method-assign]
    simulation.run()
    assert lost == 2
    assert simulation.outputs["a"] == naive_output(request, 4)
    assert simulation.outputs["b"] == naive_output(other, 4)


@pytest.mark.lesson("L07")
def test_mirrored_cache_all_lost_at_once_is_one_miss() -> None:
    """A prompt over five images whose embeddings are all gone, though the scheduler counts on them.
    Its rows grow, so it would meet them one by one, and fail at the third. (From a random run.)"""
    config = {
        "max_encode_tokens": 40,
        "encoder_cache_tokens": 40,
        "long_prefill_token_threshold": 4,
    }
    simulation = Simulation(make_config(num_blocks=40, max_num_batched_tokens=40, **config))
    images = [bytes([i]) * 32 for i in range(5)]
    first = [(4 * i, 4, name) for i, name in enumerate(images)]
    simulation.scheduler.add(make_request("a", 21, *first, max_tokens=1))
    simulation.run()
    simulation.worker.embeddings.clear()
    simulation.scheduler.add(make_request("chat", 3, max_tokens=2))
    simulation.step()
    moved = [(4 * i + 1, 4, name) for i, name in enumerate(images)]
    again = make_request("b", 22, *moved)
    simulation.scheduler.add(again)
    plans = [simulation.step() for _ in range(2)]
    rows = [(plan.num_scheduled_tokens[-1], len(plan.encode)) for plan in plans if plan]
    assert rows == [(4, 0), (22, 5)]
    simulation.run()
    assert simulation.outputs["b"] == naive_output(again, 4)


@pytest.mark.lesson("L07")
def test_mirrored_cache_a_miss_for_ever_fails_its_request_alone() -> None:
    simulation = Simulation(make_config(max_num_batched_tokens=40))
    other = make_request("b", 9)
    simulation.scheduler.add(make_request("a", 12, (2, 6, CAT)))
    simulation.scheduler.add(other)
    simulation.worker.embeddings = frozenset()  # type: ignore[assignment]
    simulation.worker._encode = lambda plan, config: None  # type: ignore[method-assign]
    simulation.run(50)
    assert simulation.ended["a"].status is RequestStatus.FINISHED_ERROR
    assert "missing" in str(simulation.ended["a"].error)
    assert simulation.outputs["b"] == naive_output(other, 4)


@pytest.mark.lesson("L15")
def test_parked() -> None:
    """A head that needs all blocks waits for its turn and gets it; those behind it follow."""
    simulation = Simulation(make_config(max_model_len=64))
    small = [make_request(f"s{i}", 6, max_tokens=10) for i in range(4)]
    large = make_request("large", 60, max_tokens=3)
    for request in (*small[:2], large, *small[2:]):
        simulation.scheduler.add(request)
    simulation.run()
    for request in (*small, large):
        count = 3 if request is large else 10
        assert simulation.outputs[request.request_id] == naive_output(request, count)


@pytest.mark.lesson("L16")
def test_client_assert_a_row_that_fails_is_its_own() -> None:
    def spoil(plan: StepPlan, result: StepResult) -> StepResult:
        return replace(result, errors={"bad": ROW_ERROR} if "bad" in plan.request_ids else {})

    simulation = Simulation(make_config(), spoil)
    good = make_request("good", 5)
    simulation.scheduler.add(make_request("bad", 5))
    simulation.scheduler.add(good)
    simulation.run()
    assert simulation.ended["bad"].error == ROW_ERROR
    assert simulation.outputs["good"] == naive_output(good, 4)


def test_stop_tokens_end_a_request() -> None:
    request = make_request("a", 9, max_tokens=10)
    expected = naive_output(request, 10)
    request.stop_token_ids = frozenset({expected[3]})
    simulation = run([request])
    assert simulation.outputs["a"] == expected[: expected.index(expected[3]) + 1]
    assert simulation.ended["a"].status is RequestStatus.FINISHED_STOPPED


def test_an_update_after_the_request_has_ended_is_ignored() -> None:
    simulation = Simulation(make_config())
    simulation.scheduler.add(make_request("a", 5))
    plan = simulation.scheduler.schedule()
    assert plan is not None
    simulation.scheduler.finish("a", RequestStatus.FINISHED_ABORTED)
    assert simulation.scheduler.update(StepResult(plan.step_id, (3,))) == []
    simulation.scheduler.check_integrity()
