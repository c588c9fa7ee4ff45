"""Thousands of random runs of the scheduler; and proof that they would notice what is broken."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from octavo.benchmarks.fakes.simulated_worker import Simulation
from octavo.benchmarks.simulate import Scenario, fails, find_failure, reproduction, shrink
from octavo.scheduler import block_hash
from octavo.scheduler.block_manager import BlockManager
from octavo.scheduler.draft import StepDraft
from octavo.scheduler.encoder_cache import EncoderCache
from octavo.scheduler.planner import Planner
from octavo.scheduler.request import ALL_TOKENS, Request
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.state import SchedulerState


@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_random_runs(first: int) -> None:
    failures = [found for seed in range(first, first + 250) if (found := find_failure(seed))]
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2000, 42_000, 5000))
def test_many_random_runs(first: int) -> None:
    failures = [found for seed in range(first, first + 5000) if (found := find_failure(seed))]
    assert not failures, "\n".join(failures)


def test_the_runs_go_where_it_is_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pressure that the runs are meant to make is there, and often."""
    seen: Counter[str] = Counter()
    step = Simulation.step

    def watched(simulation: Simulation) -> Any:
        waiting = len(simulation.scheduler.waiting)
        before = dict(simulation.ended)
        running = simulation.scheduler.running
        seen["computed before its last frames"] += any(
            request.awaits_media and request.num_sent_tokens for request in running
        )
        plan = step(simulation)
        if plan is not None:
            seen["preempted"] += len(plan.preempted)
            seen["copied"] += len(plan.copies)
            seen["evicted"] += len(plan.drop)
            seen["chunked"] += sum(not samples for samples in plan.samples)
            seen["began past the first token"] += sum(
                request.num_cached_tokens > 0 for request in simulation.scheduler.running
            )
            seen["waited"] += waiting > 0 and not plan.preempted
        for name, update in simulation.ended.items():
            if name not in before:
                error = update.error
                is_internal = error is not None and error.code == "INTERNAL"
                name = update.status.value if error is None else error.code
                seen[error.message if is_internal else name] += 1
        return plan

    monkeypatch.setattr(Simulation, "step", watched)
    for seed in range(150):
        Scenario.draw(seed).run()
    expected = (
        "computed before its last frames",
        "preempted",
        "copied",
        "evicted",
        "chunked",
        "began past the first token",
    )
    for name in (*expected, "waited", "stop", "length", "DEADLINE_EXCEEDED", "its row failed"):
        assert seen[name] >= 20, (name, seen)


def no_units(*args: Any) -> tuple[()]:
    return ()


def whole_prefix(self: Planner, request: Request) -> tuple[Any, int]:
    """Forgets that one token must be computed."""
    found, count = find_prefix(self, request)
    return found, min(count + 1, request.num_tokens - 1)


def never_copies(self: BlockManager, block_table: Any, index: int) -> tuple[int, int]:
    _, new = copy_on_write(self, block_table, index)
    return new, new


def leaks_when_three(self: BlockManager, block_table: Any) -> None:
    if len(block_table) == 3:
        block_table.pop()
    free(self, block_table)


def takes_the_first(self: Planner, request: Request, end: int, draft: StepDraft) -> bool:
    """Preempts the most urgent, which may have a row already."""
    while not self.blocks.grow(request.block_table, end):
        victim = self.running[0]
        self.state.preempt(victim)
        if victim is request:
            return False
    return True


def never_stops(self: Scheduler, request: Request, token: int) -> Any:
    stops, request.stop_token_ids = request.stop_token_ids, frozenset()
    update = append(self, request, token)
    request.stop_token_ids = stops
    return update


def draws_early(self: StepDraft, request: Request, count: int, left: int) -> None:
    ready, request.num_ready_tokens = request.num_ready_tokens, ALL_TOKENS
    add_row(self, request, count, left)
    request.num_ready_tokens = ready


def ready_at_once(self: Request) -> None:
    self.num_ready_units, self.num_ready_tokens = 0, ALL_TOKENS


find_prefix, copy_on_write = Planner._find_prefix, BlockManager.copy_on_write
free, append = BlockManager.free, Scheduler._append
add_row = StepDraft.add_row

FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a block's hash leaves out the media": (block_hash, "overlapping", no_units),
    "a block's hash leaves out the salt": (block_hash, "root_hash", lambda salt: b""),
    "a hit counts one token too many": (Planner, "_find_prefix", whole_prefix),
    "a shared block is not copied": (BlockManager, "copy_on_write", never_copies),
    "an evicted block is still found": (BlockManager, "_unseal", lambda self, block: None),
    "freeing leaks a block": (BlockManager, "free", leaks_when_three),
    "a unit is not held while it is needed": (EncoderCache, "hold", lambda *args: False),
    "units are never let go": (EncoderCache, "release", lambda *args: None),
    "anyone may be preempted for a start": (
        Planner, "_outranked", lambda self, request: self.running[::-1]
    ),
    "deadlines are not looked at": (SchedulerState, "take_expired", no_units),
    "cuts are not made before a unit": (Planner, "_cut", lambda self, r, start, count, d: count),
    "the first is preempted": (Planner, "_get_blocks", takes_the_first),
    "stop tokens are not seen": (Scheduler, "_append", never_stops),
    "a prompt draws before its last frames": (StepDraft, "add_row", draws_early),
    "tokens run ahead of their frames": (Request, "_count_ready", ready_at_once),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_cut_down(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    for seed in range(200):
        scenario = Scenario.draw(seed)
        if fails(scenario):
            small = shrink(scenario)
            assert fails(small)
            assert len(small.events) <= min(8, len(scenario.events))
            kept = ",".join(str(number) for number, _ in small.events)
            line = reproduction(seed, small)
            assert line == f"python -m octavo.benchmarks.simulate --seed {seed} --keep {kept}"
            return
    pytest.fail("200 runs did not notice")
