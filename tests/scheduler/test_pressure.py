"""Priorities, ageing, deadlines, a full queue, and a long prompt amid short chats."""

import itertools
import random

import numpy as np
import pytest

from octavo.benchmarks.fakes.simulated_worker import (
    Simulation,
    make_config,
    make_request,
    naive_output,
)
from octavo.engine.core.kv_capacity import CPU_LONG_PREFILL
from octavo.scheduler.errors import QueueFull
from octavo.scheduler.params import RequestOptions, SamplingParams
from octavo.scheduler.planner import MAX_PASSED_OVER
from octavo.scheduler.request import RequestStatus
from octavo.scheduler.step import StepPlan, StepResult

CAT = b"cat!" * 8


def test_the_urgent_go_first() -> None:
    simulation = Simulation(make_config(max_num_seqs=1))
    for name, priority in (("a", 5), ("b", 9), ("c", 0), ("d", 5), ("e", 3)):
        simulation.scheduler.add(make_request(name, 4, priority=priority))
    simulation.run()
    assert list(simulation.ended) == ["c", "e", "a", "d", "b"]


def test_nothing_starves() -> None:
    """Priority 9 amid priority 0 that never ends: it comes before all that are 90 s younger."""
    simulation = Simulation(make_config(max_num_seqs=1, priority_ageing_s=10.0))
    simulation.scheduler.add(make_request("patient", 4, priority=9))
    names = itertools.count()
    while simulation.now < 200:
        while len(simulation.scheduler.waiting) < 3:
            simulation.scheduler.add(make_request(f"{next(names)}", 4, priority=0))
        simulation.step()
        simulation.now += 1
        if "patient" in simulation.ended:
            assert 90 < simulation.now < 110
            return
    pytest.fail("it starved")


def test_preemption_takes_the_least_urgent_then_the_newest() -> None:
    simulation = Simulation(make_config(num_blocks=16, max_num_seqs=4))
    for name, priority in (("low", 9), ("old", 5), ("new", 5), ("high", 0)):
        simulation.scheduler.add(make_request(name, 4, priority=priority, max_tokens=59))
    victims: list[str] = []
    while simulation.scheduler.requests:
        plan = simulation.step()
        victims += plan.preempted if plan else ()
    assert victims[:3] == ["low", "new", "old"]


def test_an_urgent_request_takes_the_place_of_a_lesser_one() -> None:
    simulation = Simulation(make_config(max_num_seqs=2))
    for name in ("x", "y"):
        simulation.scheduler.add(make_request(name, 8, priority=7, max_tokens=20))
    for _ in range(3):
        simulation.step()
    urgent, equal = make_request("u", 8, priority=1), make_request("e", 8, priority=7)
    simulation.scheduler.add(urgent)
    simulation.scheduler.add(equal)
    plan = simulation.step()
    assert plan is not None
    assert plan.preempted == ("y",) and plan.request_ids == ("u", "x")
    simulation.run()
    assert next(iter(simulation.ended)) == "u"
    assert simulation.outputs["y"] == naive_output(make_request("y", 8), 20)


def test_a_step_looks_past_few_that_cannot_start() -> None:
    """However many wait, a step's cost is bounded."""
    config = make_config(
        num_blocks=90, max_num_partial_prefills=1, long_prefill_token_threshold=4, max_queue_len=999
    )
    simulation = Simulation(config)
    simulation.scheduler.add(make_request("chat", 4, max_tokens=60))
    simulation.step()
    for number in range(300):
        simulation.scheduler.add(make_request(f"{number}", 30))
    searches = []
    planner = simulation.scheduler._planner
    find = planner._find_prefix
    planner._find_prefix = lambda request: searches.append(request) or find(request)  # type: ignore
    simulation.step()
    assert len(searches) == 1 + MAX_PASSED_OVER
    simulation.run()


def test_no_one_is_preempted_for_nothing() -> None:
    """An urgent request that would not fit even in the place of all lesser ones takes none."""
    simulation = Simulation(make_config(num_blocks=16))
    simulation.scheduler.add(make_request("equal", 40, priority=0, max_tokens=8))
    simulation.scheduler.add(make_request("lesser", 6, priority=9, max_tokens=9))
    for _ in range(5):
        simulation.step()
    simulation.scheduler.add(make_request("urgent", 30, priority=0))
    plan = simulation.step()
    assert plan is not None and plan.preempted == ()
    assert set(plan.request_ids) == {"equal", "lesser"}
    simulation.run()


def test_no_one_is_preempted_for_blocks_that_are_shared() -> None:
    """Four forks of least priority: what they share is free only if all go, and once."""
    simulation = Simulation(make_config(num_blocks=22, max_num_batched_tokens=64, max_num_seqs=9))
    tokens = list(range(32))
    forks = [make_request(f"f{i}", tokens, seed=i, priority=9, max_tokens=9) for i in range(4)]
    simulation.scheduler.add(make_request("equal", 20, priority=0, max_tokens=20))
    simulation.scheduler.add(*forks)
    for _ in range(3):
        simulation.step()
    simulation.scheduler.add(make_request("urgent", 62, priority=0))
    plan = simulation.step()
    assert plan is not None and plan.preempted == () and len(plan.request_ids) == 5
    simulation.run()


def test_a_preempted_request_resumes_from_the_prefix_cache() -> None:
    simulation = Simulation(make_config(max_num_seqs=1, num_blocks=40))
    low = make_request("low", 30, priority=9, max_tokens=9)
    simulation.scheduler.add(low)
    for _ in range(5):
        simulation.step()
    simulation.scheduler.add(make_request("high", 5, priority=0, max_tokens=2))
    before = simulation.worker.computed
    simulation.run()
    # 33 tokens were computed, 32 of them in full blocks; 5 + 1 are the other request's.
    assert simulation.worker.computed - before == 6 + (30 + 8) - 32
    assert low.num_preemptions == 1 and low.num_cached_tokens == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_deadline_ends_a_request_with_what_it_has(steps: int) -> None:
    simulation = Simulation(make_config(max_num_batched_tokens=8))
    request = make_request("late", 20, (2, 6, CAT), deadline=1.0, max_tokens=30)
    other = make_request("other", 6)
    simulation.scheduler.add(request)
    simulation.scheduler.add(other)
    for _ in range(steps):
        simulation.step()
    simulation.now = 1.0
    have = request.num_output_tokens
    simulation.run()
    update = simulation.ended["late"]
    assert update.status is RequestStatus.FINISHED_ERROR
    text = f"DEADLINE_EXCEEDED: timed out after {have} output tokens"
    assert str(update.error) == str(request.error) == text
    assert simulation.outputs["late"] == naive_output(request, have)
    assert simulation.outputs["other"] == naive_output(other, 4)


def test_a_deadline_holds_in_the_queue_and_for_one_who_took_a_name_again() -> None:
    simulation = Simulation(make_config(max_num_seqs=1))
    simulation.scheduler.add(make_request("first", 4, max_tokens=50))
    simulation.scheduler.add(make_request("parked", 4, deadline=0.2))
    simulation.scheduler.add(make_request("name", 4, deadline=0.3))
    simulation.step()
    simulation.finish("name")
    del simulation.ended["name"]
    simulation.scheduler.add(make_request("name", 4, deadline=9.0))
    simulation.run()
    assert "DEADLINE_EXCEEDED" in str(simulation.ended["parked"].error)
    assert simulation.ended["name"].status is RequestStatus.FINISHED_LENGTH


def test_deadlines_of_requests_long_gone_take_no_memory() -> None:
    simulation = Simulation(make_config())
    for number in range(2000):
        simulation.scheduler.add(make_request(f"{number}", 4, deadline=1e9))
        simulation.finish(f"{number}")
        simulation.scheduler.expire()
    assert len(simulation.scheduler.state._deadlines) < 100


def test_a_full_queue_rejects() -> None:
    """The same outcome whether steps have run or not: free places count for the queue."""
    for steps in (0, 1):
        simulation = Simulation(make_config(max_num_seqs=2, max_queue_len=3))
        for number in range(5):
            simulation.scheduler.add(make_request(f"{number}", 4, max_tokens=9))
            for _ in range(steps):
                simulation.step()
        with pytest.raises(QueueFull, match=r"\d requests are waiting and max_queue_len=3"):
            simulation.scheduler.add(make_request("more", 4))
        assert "more" not in simulation.scheduler.requests
        simulation.run()
        simulation.scheduler.add(make_request("more", 4))
        simulation.run()


def test_a_queue_full_of_tokens_rejects_but_never_a_request_alone() -> None:
    simulation = Simulation(make_config(max_queue_tokens=30, num_blocks=40, max_num_seqs=1))
    simulation.scheduler.add(make_request("large", 40))
    simulation.step()
    simulation.scheduler.add(make_request("a", 40))
    with pytest.raises(QueueFull, match="40 tokens are waiting, and 4 more exceed max_queue_tok"):
        simulation.scheduler.add(make_request("b", 4))
    simulation.run()
    for number in range(7):
        simulation.scheduler.add(make_request(f"{number}", 4))
    simulation.run()


def test_forks_take_one_place_in_the_queue() -> None:
    simulation = Simulation(make_config(max_num_seqs=1, max_queue_len=2, max_queue_tokens=30))
    simulation.scheduler.add(make_request("runs", 4, max_tokens=30))
    simulation.step()
    tokens = list(range(20))
    simulation.scheduler.add(*[make_request(f"f{i}", tokens, seed=i) for i in range(5)])
    simulation.scheduler.add(make_request("fits", 10))
    with pytest.raises(QueueFull, match="2 requests are waiting and max_queue_len=2"):
        simulation.scheduler.add(make_request("more", 4))
    simulation.run()
    assert len(simulation.ended) == 7


def test_few_prompts_are_in_pieces_at_once() -> None:
    simulation = Simulation(
        make_config(max_num_batched_tokens=12, num_blocks=90, max_num_partial_prefills=2)
    )
    for name in "abcd":
        simulation.scheduler.add(make_request(name, 40))
    simulation.scheduler.add(make_request("short", 3))
    seen: list[tuple[str, ...]] = []
    while (plan := simulation.step()) is not None:
        rows = zip(plan.request_ids, plan.samples, strict=True)
        partial = [name for name, samples in rows if not samples]
        assert len(partial) <= 2
        seen.append(plan.request_ids)
    assert seen[0] == ("a", "short")  # half of the budget is left for who fits whole


def test_a_short_prompt_passes_long_ones_that_wait_for_their_turn() -> None:
    config = make_config(
        num_blocks=90,
        max_num_batched_tokens=30,
        long_prefill_token_threshold=8,
        max_num_partial_prefills=1,
    )
    simulation = Simulation(config)
    simulation.scheduler.add(make_request("chat", 4, max_tokens=30))
    simulation.step()
    for name in ("long", "longer"):
        simulation.scheduler.add(make_request(name, 50))
    simulation.scheduler.add(make_request("short", 7))
    assert rows_of(simulation) == {"chat": 1, "long": 8, "short": 7}
    simulation.run()
    assert list(simulation.ended)[:1] == ["short"]


def rows_of(simulation: Simulation) -> dict[str, int]:
    plan = simulation.step()
    assert plan is not None
    return dict(zip(plan.request_ids, plan.num_scheduled_tokens, strict=True))


def test_prompts_in_pieces_share_what_is_theirs() -> None:
    """A prompt of middle length comes beside a long one: it takes its share at once."""
    config = make_config(num_blocks=90, max_num_batched_tokens=99, long_prefill_token_threshold=8)
    simulation = Simulation(config)
    simulation.scheduler.add(make_request("chat", 4, max_tokens=60))
    simulation.step()
    simulation.scheduler.add(make_request("long", 60))
    assert rows_of(simulation) == {"chat": 1, "long": 8}
    simulation.scheduler.add(make_request("middle", 13))
    assert rows_of(simulation) == {"chat": 1, "long": 8, "middle": 4}
    assert rows_of(simulation) == {"chat": 1, "long": 4, "middle": 4}
    assert rows_of(simulation) == {"chat": 1, "long": 4, "middle": 5}  # all that is left of it
    assert rows_of(simulation) == {"chat": 1, "long": 8, "middle": 1}
    simulation.run()


def test_the_urgent_take_the_turn_of_a_lesser_prompt_in_pieces() -> None:
    """Which keeps its blocks, and goes on from there."""
    config = make_config(
        num_blocks=90,
        max_num_batched_tokens=99,
        long_prefill_token_threshold=8,
        max_num_partial_prefills=1,
    )
    simulation = Simulation(config)
    simulation.scheduler.add(make_request("chat", 4, max_tokens=60))
    simulation.step()
    simulation.scheduler.add(make_request("long", 60, priority=9))
    simulation.step()
    simulation.scheduler.add(make_request("urgent", 20, priority=0))
    assert rows_of(simulation) == {"urgent": 8, "chat": 1}
    assert rows_of(simulation) == {"urgent": 8, "chat": 1}
    assert rows_of(simulation) == {"urgent": 4, "chat": 1, "long": 8}
    assert simulation.preemptions == 0
    simulation.run()


def test_a_long_prompt_leaves_room_for_a_short_one_also_when_no_one_decodes() -> None:
    config = make_config(num_blocks=90, max_num_batched_tokens=20, long_prefill_token_threshold=8)
    simulation = Simulation(config)
    for name, size in (("long", 60), ("longer", 60), ("short", 8), ("second", 8)):
        simulation.scheduler.add(make_request(name, size))
    assert rows_of(simulation) == {"long": 12, "short": 8}
    simulation.run()


def test_a_text_is_not_held_up_by_an_image_that_waits_for_room() -> None:
    config = make_config(num_blocks=90, max_num_batched_tokens=9, encoder_cache_tokens=12)
    simulation = Simulation(config)
    simulation.scheduler.add(make_request("first", 40, (2, 12, b"a" * 32)))
    simulation.step()
    simulation.scheduler.add(make_request("second", 20, (0, 12, b"b" * 32)))
    simulation.scheduler.add(make_request("third", 20, (3, 4, b"c" * 32)))
    simulation.scheduler.add(make_request("text", 3))
    assert set(rows_of(simulation)) == {"first", "text"}
    simulation.run()


def test_blocks_that_a_running_prompt_will_need_are_not_given_away() -> None:
    simulation = Simulation(make_config(num_blocks=16, max_num_batched_tokens=8))
    simulation.scheduler.add(make_request("long", 50, max_tokens=2))
    simulation.step()
    for name in "abc":
        simulation.scheduler.add(make_request(name, 4, max_tokens=30))
    simulation.run()
    assert simulation.scheduler.requests == {} and simulation.ended["long"]
    assert simulation.preemptions <= 1  # of those beside each other, none for the long one


@pytest.mark.lesson("L15")
def test_parked_a_long_prompt_gets_its_turn_amid_short_ones_that_never_end() -> None:
    config = make_config(num_blocks=400, max_num_batched_tokens=24, long_prefill_token_threshold=8)
    simulation = Simulation(config)
    for name in ("long", "longer"):
        simulation.scheduler.add(make_request(name, 50))
    names = itertools.count()
    done: dict[str, int] = {}
    for step in range(60):
        while len(simulation.scheduler.waiting) < 3:
            simulation.scheduler.add(make_request(f"{next(names)}", 5, max_tokens=3))
        plan = simulation.step()
        assert plan is not None
        rows = zip(plan.request_ids, plan.samples, strict=True)
        done |= {name: step for name, samples in rows if samples and name not in done}
    assert done["long"] < done["longer"] < 20


def test_a_long_prompt_alone_is_not_held_back() -> None:
    config = make_config(num_blocks=90, max_num_batched_tokens=30, long_prefill_token_threshold=8)
    simulation = Simulation(config)
    simulation.scheduler.add(make_request("long", 50))
    plan = simulation.step()
    assert plan is not None and plan.num_scheduled_tokens == (30,)
    simulation.run()


def test_every_decoding_request_keeps_its_token_beside_an_older_prompt() -> None:
    config = make_config(num_blocks=90, max_num_batched_tokens=10, long_prefill_token_threshold=99)
    simulation = Simulation(config)
    simulation.scheduler.add(make_request("long", 50))
    simulation.step()
    for name in "xyz":
        simulation.scheduler.add(make_request(name, 2, priority=0, max_tokens=30))
    simulation.step()
    for _ in range(3):
        assert rows_of(simulation) == {"x": 1, "y": 1, "z": 1, "long": 7}
    simulation.run()


def seconds_of(plan: StepPlan) -> float:
    """A step at the 2B shape on two cores, from what was measured: reading the weights once, and
    each token's share of the matrix products."""
    return 0.115 + 0.0015 * plan.num_tokens


def chat_gaps(with_long: bool, threshold: int) -> list[float]:
    """Seconds between the tokens of 32 chats; a prompt of 32k tokens comes in their midst."""
    config = make_config(
        num_blocks=4000,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=32768,
        long_prefill_token_threshold=threshold,
    )
    simulation = Simulation(config, step_seconds=seconds_of)
    rng = random.Random(0)
    chats = [f"chat{i}" for i in range(32)]
    for name in chats:
        request = make_request(name, rng.randint(20, 60), max_tokens=rng.randint(400, 500))
        simulation.scheduler.add(request)
    last: dict[str, float] = {}
    gaps: list[float] = []
    for number in range(2000):
        if number == 10 and with_long:
            simulation.scheduler.add(make_request("long", [1] * 32_000))
        plan = simulation.scheduler.schedule()
        if plan is None:
            break
        simulation.now += seconds_of(plan)
        result = StepResult(plan.step_id, (1,) * sum(plan.samples))
        for update in simulation.scheduler.update(result):
            name = update.request_id
            if name in last:
                gaps.append(simulation.now - last[name])
            if name in chats:
                last[name] = simulation.now
    assert simulation.scheduler.requests == {}
    return gaps


def test_a_long_prompt_does_not_stall_short_chats() -> None:
    """The figures of docs/scheduling.md: p99 of the time between tokens, with the CPU's default."""
    alone, beside = (np.percentile(chat_gaps(long, CPU_LONG_PREFILL), 99) for long in (False, True))
    unbounded = np.percentile(chat_gaps(True, 32_768), 99)
    print(f"p99 {alone:.3f} s alone, {beside:.3f} s beside it, {unbounded:.3f} s without a bound")
    assert beside < 2 * alone
    assert unbounded > 10 * alone  # so the bound is what does it


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"priority": 10}, "priority=10: must be from 0 to 9"),
        ({"priority": -1}, "from 0 to 9"),
        ({"priority": 1.5}, "must be an integer"),
        ({"timeout_s": float("nan")}, "finite"),
        ({"timeout_s": -1}, "timeout_s=-1"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"cache_salt": "x" * 257}, "at most 256 characters"),
        ({"cache_salt": b"x"}, "must be a string"),
    ],
)
def test_unbounded_n_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RequestOptions(**options)


@pytest.mark.lesson("L27")
@pytest.mark.parametrize("n", [0, -1, 65, 10**30, 1.5, True, None, "2"])
def test_unbounded_n(n: object) -> None:
    with pytest.raises(ValueError, match="n="):
        SamplingParams(n=n)  # type: ignore[arg-type]
