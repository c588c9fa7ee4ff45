"""Random runs of the scheduler against a simulated worker; failing runs are minimized.

    python -m octavo.benchmarks.simulate --seeds 0:5000
    python -m octavo.benchmarks.simulate --seed 17 --keep 3,8,12      # reproduce one failure

A seed determines the limits (mostly tight ones) and a list of events: requests with shared
prefixes, images, forks, priorities, deadlines and salts; videos whose later frames arrive during
the run; aborts; failing rows; lost embeddings; worker crashes. Most runs plan a step while the
previous one is in flight. In every case, each admitted request must finish exactly once, with the
tokens it would get when run alone, and leak no state.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.progress import track

from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.errors import AdmissionError, RequestError
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.step import StepPlan, StepResult

from .fakes.simulated_requests import Unmade, draw_requests, withhold
from .fakes.simulated_worker import Simulation, make_config, naive_output

KINDS = ["add", "abort", "fail", "forget", "kill"]
ROW_FAILED = RequestError("INTERNAL", "its row failed")
NUM_STEPS = 60  # steps over which events are spread


@dataclass(frozen=True)
class Event:
    """Something that happens before a step; `target` refers to requests by their "add" event."""

    step: int
    kind: str  # "add" | "abort" | "fail" | "forget" | "kill"
    seed: int  # of the request that an "add" submits
    target: int = 0  # the "add" event whose request is aborted or fails


@dataclass(frozen=True)
class Scenario:
    config: SchedulerConfig
    overlap: bool
    events: tuple[tuple[int, Event], ...]  # numbered, in order of their steps

    @classmethod
    def draw(cls, seed: int) -> Scenario:
        rng = random.Random(seed)
        config = make_config(
            num_blocks=rng.choice([9, 13, 16, 17, 20, 40]),
            max_num_batched_tokens=rng.choice([1, 4, 11, 30]),
            max_num_seqs=rng.choice([1, 3, 8]),
            max_encode_tokens=rng.choice([13, 20]),
            encoder_cache_tokens=rng.choice([13, 20, 60]),
            max_num_partial_prefills=rng.choice([1, 2, 8]),
            long_prefill_token_threshold=rng.choice([1, 5, 99]),
            max_queue_len=rng.choice([2, 6, 99]),
            max_queue_tokens=rng.choice([60, 9999]),
            priority_ageing_s=rng.choice([0.01, 0.2, 5.0]),
        )
        count = rng.randint(1, 40)
        kinds = rng.choices(KINDS, [80, 10, 4, 4, 2], k=count)
        steps = sorted(rng.randrange(NUM_STEPS) for _ in kinds)
        drawn = [
            Event(step, kind, rng.getrandbits(40), rng.randrange(max(1, i)))
            for i, (step, kind) in enumerate(zip(steps, kinds, strict=True))
        ]
        return cls(config, rng.random() < 0.8, tuple(enumerate(drawn)))

    def keep(self, numbers: Sequence[int]) -> Scenario:
        return replace(self, events=tuple(e for e in self.events if e[0] in set(numbers)))

    def run(self) -> None:
        """Run the scenario. Raises AssertionError, or the exception that broke it."""
        _Run(self).run()


class _Run:
    """A scenario being run."""

    def __init__(self, scenario: Scenario) -> None:
        self.simulation = Simulation(
            scenario.config,
            self._spoil,
            scenario.overlap,
            step_seconds=lambda plan: 0.01 + plan.num_tokens / 1e3,
        )
        self.events = list(reversed(scenario.events))
        self.admitted: dict[str, Request] = {}
        self.failing: set[str] = set()
        self.aborted_in_step: list[str] = []  # between a step's plan and its result
        self.num_forgotten = 0
        self.num_kills = 0
        self.unmade: list[Unmade] = []

    def run(self) -> None:
        for step in range(NUM_STEPS):
            while self.events and self.events[-1][1].step <= step:
                self._apply(*self.events.pop())
            self._supply(0.3)
            plan = self.simulation.step()
            if plan is not None:
                self._check_plan(plan)
        self._supply(1.0)
        self.simulation.run()
        assert self.simulation.ended.keys() == self.admitted.keys(), "unfinished requests"
        for request in self.admitted.values():
            self._check_end(request)

    def _apply(self, number: int, event: Event) -> None:
        if event.kind == "add":
            rng = random.Random(event.seed)
            requests, media_hashes = draw_requests(f"r{number}", rng, self.simulation.now)
            if rng.random() < 0.3:
                self.unmade.append(withhold(requests, media_hashes, rng))
            try:
                self.simulation.scheduler.add(*requests)
            except AdmissionError:
                return
            self.admitted |= {request.request_id: request for request in requests}
        elif event.kind == "abort" and event.seed % 2:
            self.simulation.finish(f"r{event.target}")
        elif event.kind == "abort":
            self.aborted_in_step.append(f"r{event.target}")
        elif event.kind == "fail":
            self.failing.add(f"r{event.target}")
        elif event.kind == "forget":
            self.num_forgotten += 1
            self.simulation.worker.embeddings.clear()
        else:
            self.num_kills += 1
            self.simulation.reset_after_worker_restart()

    def _supply(self, chance: float) -> None:
        """Supply the next units of each video, each with probability `chance`."""
        for unmade in self.unmade:
            while unmade.media_hashes and unmade.rng.random() < chance:
                media_hash = unmade.media_hashes.pop(0)
                for request in unmade.requests:
                    request.supply([media_hash])

    def _spoil(self, plan: StepPlan, result: StepResult) -> StepResult:
        for name in self.aborted_in_step:
            self.simulation.finish(name)
        self.aborted_in_step.clear()
        failing = self.failing.intersection(plan.request_ids)
        return replace(result, errors=dict.fromkeys(failing, ROW_FAILED))

    def _check_plan(self, plan: StepPlan) -> None:
        """Check that requests run, that victims have lower priority, and that deadlines hold."""
        if not any(self.unmade):
            assert plan.request_ids, "the step is empty"
        rows = [self.admitted[name] for name in plan.request_ids]
        for name in plan.preempted:
            assert all(row.urgency < self.admitted[name].urgency for row in rows), "wrong victim"
        planned_at = self.simulation.planned_at
        assert all(row.deadline > planned_at for row in rows), "a request ran past its deadline"
        awaiting = [row for row, at in zip(rows, plan.awaits, strict=False) if at >= 0]
        assert not any(row.is_guided for row in awaiting), "a guided row awaits a token"

    def _check_end(self, request: Request) -> None:
        update = self.simulation.ended[request.request_id]
        output = self.simulation.outputs[request.request_id]
        assert output == list(request.output_token_ids)
        expected = naive_output(request, request.max_tokens)
        stops = [i for i, token in enumerate(expected) if token in request.stop_token_ids]
        whole = expected[: stops[0] + 1] if stops else expected
        assert output == whole[: len(output)], f"{request.request_id}: differs from a run alone"
        by_itself = (RequestStatus.FINISHED_LENGTH, RequestStatus.FINISHED_STOPPED)
        assert (update.status in by_itself) == (len(output) == len(whole)), "wrong length"
        if update.status in by_itself:
            stopped = output[-1] in request.stop_token_ids
            assert stopped == (update.status is RequestStatus.FINISHED_STOPPED)
        elif update.status is RequestStatus.FINISHED_ERROR:
            text = str(update.error)
            late = "DEADLINE_EXCEEDED" in text and request.deadline <= self.simulation.now
            missed = "missing" in text and self.num_forgotten >= 3
            failed = update.error == ROW_FAILED and request.request_id in self.failing
            killed = "crashed the workers twice" in text and self.num_kills >= 2
            assert late or missed or failed or killed, text


def shrink(scenario: Scenario) -> Scenario:
    """Minimize a failing scenario by removing ever smaller runs of events."""
    numbers = [number for number, _ in scenario.events]
    size = len(numbers)
    while size:
        for start in range(0, len(numbers), size):
            fewer = numbers[:start] + numbers[start + size :]
            if fails(scenario.keep(fewer)):
                numbers = fewer
                break
        else:
            size //= 2
        size = min(size, len(numbers))
    return scenario.keep(numbers)


def fails(scenario: Scenario) -> str:
    """Return the error of a scenario; empty if it passes."""
    try:
        scenario.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def reproduction(seed: int, scenario: Scenario) -> str:
    """Return the command that reproduces a scenario."""
    kept = ",".join(str(number) for number, _ in scenario.events)
    return f"python -m octavo.benchmarks.simulate --seed {seed} --keep {kept}"


def find_failure(seed: int) -> str:
    """Run a seed; return the minimized failure with its command and cause, or ""."""
    scenario = Scenario.draw(seed)
    if not fails(scenario):
        return ""
    small = shrink(scenario)
    return f"{reproduction(seed, small)}\n  {fails(small)}"


def main(
    seeds: Annotated[str, typer.Option(help="Range of seeds to run, as FIRST:END.")] = "0:1000",
    seed: Annotated[int | None, typer.Option(help="Run only this seed.")] = None,
    keep: Annotated[str, typer.Option(help="Events of --seed to keep. Default: all.")] = "",
) -> None:
    """Run random scheduler scenarios; print each failure as a command that reproduces it."""
    if seed is not None:
        scenario = Scenario.draw(seed)
        if keep:
            scenario = scenario.keep([int(number) for number in keep.split(",")])
        for number, event in scenario.events:
            print(number, event)
        scenario.run()
        print("passed")
        return
    first, _, end = seeds.partition(":")
    failures = [found for s in track(range(int(first), int(end))) if (found := find_failure(s))]
    print("\n".join(failures) or "all passed")
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
