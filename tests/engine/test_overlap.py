"""A step is planned and sent while the one before it runs: what may be planned, what counts of it,
and that nobody can tell by the tokens."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.benchmarks.fakes.simulated_worker import (
    Simulation,
    make_config,
    make_request,
    naive_output,
)
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.core.penalty_slots import SamplingSlots
from octavo.engine.core.step_pipeline import StepPipeline
from octavo.engine.observability.stats import EngineStats
from octavo.engine.structured_output.matchers import Matchers
from octavo.engine.worker.group import SentStep
from octavo.engine.worker.watch import MIN_BOUND, StepBound
from octavo.scheduler.errors import RequestError
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.step import StepPlan, StepResult

CAT = b"c" * 32


def overlapped(*requests: Request, **limits: int) -> Simulation:
    simulation = Simulation(make_config(**limits), overlap=True)
    for request in requests:
        simulation.scheduler.add(request)
    return simulation


ROW_ERROR = RequestError("INTERNAL", "its row")


def plan(simulation: Simulation) -> StepPlan:
    """A plan that is on its way from now on."""
    made = simulation.step()
    assert made is not None
    return made


def test_a_row_awaits_the_token_by_its_place_among_those_drawn() -> None:
    requests = (make_request("long", 13), make_request("a", 3), make_request("b", 2))
    simulation = overlapped(*requests, max_num_batched_tokens=12)
    first = plan(simulation)  # a prompt in pieces, and two that end with a token each
    assert first.request_ids == ("long", "a", "b")
    assert first.samples == (False, True, True) and first.awaits == (-1, -1, -1)
    second = plan(simulation)
    assert second.request_ids == ("long", "a", "b") and second.samples == (True, True, True)
    assert second.num_computed_tokens[1:] == (3, 2)
    assert second.awaits == (-1, 0, 1)
    assert plan(simulation).awaits == (0, 1, 2)


def test_a_prompt_in_pieces_awaits_nothing() -> None:
    simulation = overlapped(make_request("a", 30, max_tokens=2), max_num_batched_tokens=10)
    plans = [plan(simulation) for _ in range(4)]
    assert [p.num_computed_tokens for p in plans] == [(0,), (10,), (20,), (30,)]
    assert [p.awaits for p in plans] == [(-1,), (-1,), (-1,), (0,)]


def test_nothing_is_planned_past_the_last_token() -> None:
    """It is known beforehand, unlike a stop token."""
    simulation = overlapped(make_request("a", 5, max_tokens=3))
    for _ in range(3):
        plan(simulation)
    assert simulation.scheduler.schedule() is None
    simulation.run()
    assert simulation.worker.computed == 5 + 2


@pytest.mark.parametrize("at", range(6))
def test_a_stop_token_costs_one_token_at_most(at: int) -> None:
    request = make_request("a", 9, max_tokens=20)
    expected = naive_output(request, 20)
    request.stop_token_ids = frozenset({expected[at]})
    first = expected.index(expected[at])
    simulation = overlapped(request)
    simulation.run()
    assert simulation.outputs["a"] == expected[: first + 1]
    assert simulation.worker.computed - (9 + first) in (0, 1)


def test_a_block_is_found_only_once_its_step_has_reported() -> None:
    prompt = list(range(20))
    simulation = overlapped(make_request("a", prompt, max_tokens=9))
    plan(simulation)
    simulation.scheduler.add(make_request("twin", prompt, max_tokens=9))
    plan(simulation)  # its prompt's blocks are filled by a step on its way
    assert simulation.scheduler.requests["twin"].num_cached_tokens == 0
    simulation.scheduler.add(make_request("late", prompt, max_tokens=9))
    plan(simulation)
    assert simulation.scheduler.requests["late"].num_cached_tokens == 16
    simulation.run()
    assert simulation.outputs["twin"] == simulation.outputs["a"] == simulation.outputs["late"]


def test_what_a_failing_step_fills_is_found_by_no_one() -> None:
    prompt = list(range(20))
    simulation = overlapped(make_request("bad", prompt, max_tokens=9))
    simulation.spoil = lambda plan, result: replace(
        result, errors={name: ROW_ERROR for name in plan.request_ids if name == "bad"}
    )
    plan(simulation)
    simulation.scheduler.add(make_request("twin", prompt))
    plan(simulation)
    simulation.run()
    assert simulation.ended["bad"].error == ROW_ERROR
    assert simulation.scheduler.blocks.num_free == simulation.config.num_blocks
    twin = make_request("twin", prompt)
    assert simulation.outputs["twin"] == naive_output(twin, 4)


def test_one_that_is_preempted_keeps_the_token_on_its_way() -> None:
    first, second = make_request("first", 7, max_tokens=9), make_request("second", 7, max_tokens=9)
    simulation = overlapped(first, second, num_blocks=5)
    while second.status is not RequestStatus.PREEMPTED:
        simulation.step()
    before = second.num_output_tokens  # with that of the step which was on its way
    steps = [step for step in simulation.worker.plans if "second" in step.request_ids]
    assert before == sum(step.samples[step.request_ids.index("second")] for step in steps)
    simulation.run()
    for request in (first, second):
        assert simulation.outputs[request.request_id] == naive_output(request, 9)


def test_a_token_that_arrives_after_preemption_may_be_the_last() -> None:
    request = make_request("a", 5, max_tokens=3)
    simulation = overlapped(request)
    for _ in range(3):
        plan(simulation)
    simulation.scheduler.state.preempt(request)
    simulation.receive()
    assert simulation.ended["a"].status is RequestStatus.FINISHED_LENGTH
    simulation.scheduler.check_integrity()


def test_what_one_that_fails_after_preemption_computed_is_found_by_no_one() -> None:
    request = make_request("bad", list(range(20)), max_tokens=9)
    simulation = overlapped(request)
    plan(simulation)
    plan(simulation)
    assert request.num_computed_tokens == 16 and len(simulation.scheduler.blocks._cached) == 4
    simulation.scheduler.state.preempt(request)
    simulation.spoil = lambda plan, result: replace(result, errors={"bad": ROW_ERROR})
    simulation.receive()
    assert simulation.ended["bad"].error == ROW_ERROR
    simulation.scheduler.check_integrity()
    again = make_request("again", list(range(20)))
    simulation.spoil = lambda plan, result: result
    simulation.scheduler.add(again)
    simulation.run()
    assert again.num_cached_tokens == 0
    assert simulation.outputs["again"] == naive_output(again, 4)


def test_an_image_that_comes_twice_is_held_for_what_is_sent_of_it() -> None:
    request = make_request("a", 40, (0, 8, CAT), (8, 8, CAT), max_tokens=4)
    simulation = overlapped(request, max_num_batched_tokens=8, num_blocks=40)
    plan(simulation)
    plan(simulation)  # the first one is computed, the second is on its way
    assert request.num_computed_tokens == 8 and request.num_sent_tokens == 16
    cache = simulation.scheduler.encoder_cache
    assert cache.room() == cache.capacity - 8, "let go while a row that needs it is on its way"
    plan(simulation)
    assert cache.room() == cache.capacity
    simulation.run()
    assert simulation.outputs["a"] == naive_output(request, 4)


def test_new_workers_have_empty_slots() -> None:
    scheduler = Simulation(make_config()).scheduler
    stats = EngineStats(scheduler, None)  # type: ignore[arg-type]
    group: Any = None
    pipeline = StepPipeline(scheduler, group, lambda name: {}, None, True, stats, Matchers())
    request = running("a")
    pipeline._slots.place(request, 0, 4)
    assert pipeline.reset_after_worker_restart() == []
    assert pipeline._slots.place(request, 4, 1) == (0, False)


def test_what_follows_a_row_that_computed_nothing_is_void() -> None:
    """The embedding was lost: the next step, planned before that was known, counts for nothing."""
    request = make_request("a", 30, (4, 8, CAT), max_tokens=4)
    simulation = overlapped(request, max_num_batched_tokens=8)
    plan(simulation)  # tokens 0 to 8
    simulation.worker.embeddings.clear()
    assert plan(simulation).num_computed_tokens == (8,)
    assert plan(simulation).num_computed_tokens == (16,)  # before the loss was known
    assert request.num_computed_tokens == 8
    again = plan(simulation)
    assert again.num_computed_tokens == (8,) and len(again.encode) == 1
    assert request.num_computed_tokens == 8, "the void row was taken for computed"
    simulation.run()
    assert simulation.outputs["a"] == naive_output(request, 4)


def test_what_two_steps_lacked_is_encoded_once_more() -> None:
    """The second tells of the loss when a step on its way makes good for it already."""
    first, second = (make_request(name, 30, (4, 8, CAT), max_tokens=4) for name in "ab")
    simulation = overlapped(
        first,
        second,
        max_num_batched_tokens=20,
        num_blocks=40,
        long_prefill_token_threshold=99,
    )
    plan(simulation)
    simulation.worker.embeddings.clear()
    simulation.run()
    assert sum(len(step.encode) for step in simulation.worker.plans) == 2
    for request in (first, second):
        assert simulation.outputs[request.request_id] == naive_output(request, 4)


def test_a_name_may_be_another_request_s_while_a_step_of_the_first_is_on_its_way() -> None:
    simulation = overlapped(make_request("a", 9, max_tokens=9))
    plan(simulation)
    simulation.finish("a")
    del simulation.ended["a"], simulation.outputs["a"]
    second = make_request("a", [1, 2, 3], max_tokens=3)
    simulation.scheduler.add(second)
    assert simulation.scheduler.update(StepResult(1, (7,))) == []
    simulation.in_flight.clear()
    assert second.num_output_tokens == 0
    simulation.worker._digests.clear()
    simulation.run()
    assert simulation.outputs["a"] == naive_output(second, 3)


def test_who_may_have_ended_the_workers_runs_alone_and_nothing_beside() -> None:
    simulation = overlapped(*(make_request(name, 5, max_tokens=9) for name in "abc"))
    plan(simulation)
    plan(simulation)
    simulation.reset_after_worker_restart()
    assert len(simulation.scheduler.state.suspects) == 3
    for name in "abc":
        assert plan(simulation).request_ids == (name,)
        assert simulation.scheduler.schedule() is None  # a step of a suspect is on its way
        simulation.receive()
    assert not simulation.scheduler.state.suspects
    assert len(plan(simulation).request_ids) == 3
    simulation.run()
    for name in "abc":
        expected = naive_output(make_request(name, 5, max_tokens=9), 9)
        assert simulation.outputs[name] == expected


def test_both_steps_on_their_way_are_suspect() -> None:
    simulation = overlapped(make_request("a", 5, max_tokens=9))
    plan(simulation)
    simulation.scheduler.add(make_request("b", 5, max_tokens=9))
    assert simulation.scheduler.schedule() is not None
    assert simulation.scheduler.reset_after_worker_restart() == []
    assert [each.request_id for each in simulation.scheduler.state.suspects] == ["a", "b"]


def test_only_two_steps_are_ever_on_their_way() -> None:
    simulation = overlapped(make_request("a", 5, max_tokens=9))
    plan(simulation)
    assert simulation.scheduler.schedule() is not None
    with pytest.raises(AssertionError, match="two steps"):
        simulation.scheduler.schedule()


# Slots for what a repetition penalty looks at


def running(name: str) -> Request:
    request = make_request(name, 4)
    request.status = RequestStatus.RUNNING
    return request


def test_a_slot_is_filled_once_and_kept_while_tokens_follow_each_other() -> None:
    slots, request = SamplingSlots(), running("a")
    assert slots.place(request, 0, 4) == (0, False)
    assert slots.place(request, 4, 1) == (0, True)
    assert slots.place(request, 5, 1) == (0, True)
    assert slots.place(request, 5, 1) == (0, False)  # computed again: the first time was void
    assert slots.place(request, 0, 7) == (0, False)  # preempted and resumed
    slots.reset()
    assert slots.place(request, 7, 1) == (0, False)


def test_slots_of_those_that_run_are_their_own() -> None:
    slots, requests = SamplingSlots(), [running(str(i)) for i in range(4)]
    assert [slots.place(request, 0, 4)[0] for request in requests] == [0, 1, 2, 3]
    requests[1].status, requests[2].status = (
        RequestStatus.FINISHED_STOPPED, RequestStatus.PREEMPTED,
    )  # fmt: skip
    new = [running("new"), running("newer"), running("newest")]
    assert {slots.place(new[0], 0, 4)[0], slots.place(new[1], 0, 4)[0]} == {1, 2}
    assert slots.place(new[2], 0, 4) == (4, False)
    assert slots.place(requests[0], 4, 1) == (0, True)
    requests[2].status = RequestStatus.RUNNING
    assert slots.place(requests[2], 4, 1) == (5, False)


# The engine

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def ask(text: str, seed: int | None = None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, (84, 112, 3), np.uint8)
        parts.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
    return [{"role": "user", "content": parts}]


ASKED = [
    (ask("Who?"), octavo.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)),
    (ask("What is it?", 1), octavo.SamplingParams(temperature=1.1, seed=3, max_tokens=40, n=2)),
    (ask("And a long one, in many words. " * 4, 2), octavo.SamplingParams(
        temperature=0.9, seed=5, repetition_penalty=1.4, max_tokens=50, ignore_eos=True)),
    (ask("Go on", 1), octavo.SamplingParams(
        temperature=0, repetition_penalty=1.2, max_tokens=25, ignore_eos=True)),
    (ask("And?"), octavo.SamplingParams(temperature=1.5, seed=8, max_tokens=60, stop=("e", "7"))),
]  # fmt: skip


def answers(checkpoint: Path, **settings: Any) -> tuple[list[Any], int]:
    """Of all that is asked, and how often a request was preempted."""
    num_preempted = [0]
    with octavo.LLM(checkpoint, **{**SETTINGS, **settings}) as llm:
        state = llm.engine.scheduler.state
        preempt = state.preempt

        def counted(request: Request) -> None:
            num_preempted[0] += 1
            preempt(request)

        state.preempt = counted  # type: ignore[method-assign]
        outs = llm.chat([messages for messages, _ in ASKED], [params for _, params in ASKED])
        llm.engine.scheduler.check_integrity()
    found = [[(o.token_ids, o.text, o.finish_reason) for o in out.outputs] for out in outs]
    return [*found, [out.usage for out in outs]], num_preempted[0]


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_num_batched_tokens": 9}, {"kv_cache_memory_bytes": 18 * 8192, "max_model_len": 280}],
    ids=["whole", "chunked", "preempted"],
)
def test_the_tokens_are_those_of_the_engine_that_runs_in_turn(
    checkpoint: Path, limits: dict[str, Any]
) -> None:
    in_turn, _ = answers(checkpoint, **limits, overlap_steps=False)
    overlapped, num_preempted = answers(checkpoint, **limits)
    assert overlapped[:-1] == in_turn[:-1]
    assert (num_preempted > 0) == ("kv_cache_memory_bytes" in limits)


def test_the_next_step_is_sent_before_a_result_is_waited_for(checkpoint: Path) -> None:
    calls: list[str] = []
    for overlap in (True, False):
        calls.clear()
        with octavo.LLM(checkpoint, **SETTINGS, overlap_steps=overlap) as llm:
            group = llm.engine.group
            send, receive = group.send, group.receive

            def sent(batch: Any, step_id: int, send: Any = send) -> None:
                calls.append("send")
                send(batch, step_id)

            def received(receive: Any = receive) -> Any:
                calls.append("receive")
                return receive()

            group.send, group.receive = sent, received  # type: ignore[method-assign]
            llm.chat(*ASKED[0])
        assert calls.count("send") == calls.count("receive") == 30
        pairs = list(zip(calls[0::2], calls[1::2], strict=True))
        if overlap:
            assert pairs == [("send", "send"), *[("receive", "send")] * 28, ("receive", "receive")]
        else:
            assert pairs == [("send", "receive")] * 30


def test_what_the_penalty_looks_at_travels_once(checkpoint: Path) -> None:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        send, sizes = llm.engine.group.send, []

        def sent(batch: Any, step_id: int) -> None:
            sizes.append(sum(seen.size for seen in batch.sampling.seen_token_ids))
            send(batch, step_id)

        llm.engine.group.send = sent  # type: ignore[method-assign]
        out = llm.chat(*ASKED[3])[0]
    assert out.usage is not None
    assert sizes == [out.usage.prompt_tokens] + [0] * 24


def test_the_time_in_which_no_one_asks_is_not_a_step_s(checkpoint: Path) -> None:
    """A step of a request that stopped is left on its way until the next request comes."""
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        first = llm.chat(*ASKED[0])[0].outputs[0]
        stop = replace(ASKED[0][1], stop=(first.text[3],))
        llm.chat(ASKED[0][0], stop)
        assert len(llm.engine.group._sent) == 1, "nothing was on its way"
        time.sleep(1.0)
        learnt: list[float] = []
        bound = llm.engine.group._bound
        learn = bound.learn
        bound.learn = lambda work, seconds: learnt.append(seconds) or learn(work, seconds)  # type: ignore
        assert llm.chat(*ASKED[0])[0].outputs[0].token_ids == first.token_ids
        assert max(learnt) < 0.9


def test_a_moment_that_is_noted_late_makes_no_step_of_no_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC may let an answer be seen before it has run what notes its moment."""
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        group = llm.engine.group

        def ask_and_note_nothing(sent: SentStep, rank: int) -> Any:
            return group._workers[rank].stub.Step.future(sent.requests[rank])

        monkeypatch.setattr(group, "_call_step", ask_and_note_nothing)
        llm.chat(*ASKED[0])
        steps = llm.engine.stats.latest_steps
        assert len(steps) > 3 and all(step.seconds > 0 for step in steps)
        assert time.monotonic() - steps[-1].done_at < 60


def test_the_bound_of_a_step_follows_its_work_and_what_steps_have_taken() -> None:
    bound = StepBound()
    assert bound.seconds(1) >= MIN_BOUND and bound.seconds(5000) > 2 * bound.seconds(50)
    for _ in range(300):
        bound.learn(work=1000, seconds=0.1)
    quick = bound.seconds(1000)
    assert MIN_BOUND < quick < MIN_BOUND + 10
    bound.learn(work=1000, seconds=60)  # one that is slow is believed at once
    assert bound.seconds(1000) > 20 * 60
    assert bound.seconds(10_000) > 10 * 20 * 60
