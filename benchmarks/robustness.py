"""Random failures under load, checked against a run without failures.

    python -m octavo.benchmarks.robustness --seeds 0:20
    python -m octavo.benchmarks.robustness --seed 17

A seed determines ranks, requests (texts, images, several samples, random arrival times) and
failures: a worker is killed, hangs, closes its connection, raises or runs out of memory at some
point of some step. Every request must finish exactly once, with the same tokens as without
failures, none lost or repeated; and no state may leak. Modeled on etcd's robustness tests.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.llm import LLM
from octavo.engine.outputs import OutputDelta
from octavo.engine.runner.batch import InputBatch
from octavo.engine.utils import failpoints
from octavo.engine.worker import link
from octavo.scheduler.params import SamplingParams

from .fakes.tiny_checkpoint import write_tiny_checkpoint

PLACES = ("worker.received", "worker.unpacked", "worker.computed", "worker.replies")
ACTIONS = ("kill", "stop", "raise", "exit", "oom", "cut")
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 4 << 20,
    "max_restarts": 99,
}
QUARANTINED = "INTERNAL: the request's step crashed the workers twice"


@dataclass(frozen=True)
class Ask:
    """A request and its arrival time."""

    text: str
    image_seed: int | None
    num_tokens: int
    num_answers: int
    after: float  # seconds from the start of the round

    @property
    def messages(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.image_seed is not None:
            pixels = np.random.default_rng(self.image_seed).integers(0, 256, (56, 84, 3), np.uint8)
            parts.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
        return [{"role": "user", "content": parts}]

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=self.num_tokens, n=self.num_answers, ignore_eos=True
        )


@dataclass(frozen=True)
class Round:
    num_ranks: int
    asks: tuple[Ask, ...]
    faults: tuple[str, ...]  # failpoint rules; `_faults` adds a file that makes each fire once

    @classmethod
    def draw(cls, seed: int) -> Round:
        rng = random.Random(seed)
        num_ranks = rng.choice([1, 1, 2])
        asks = [
            Ask(
                text=rng.choice(["Who?", "What is it?", "And now something longer than that."]),
                image_seed=rng.choice([None, 1, 2]),
                num_tokens=rng.randint(5, 60),
                num_answers=rng.choice([1, 1, 3]),
                after=rng.random() * rng.choice([0.1, 3.0]),
            )
            for _ in range(rng.randint(2, 7))
        ]
        faults = [
            f"{rng.choice(PLACES)}@{rng.randrange(num_ranks)}={rng.choice(ACTIONS)}"
            f"#{rng.randint(1, 60)}"
            for _ in range(rng.randint(1, 3))
        ]
        return cls(num_ranks, tuple(asks), tuple(faults))


@dataclass
class History:
    """Deltas that one client received, in order."""

    ask: Ask
    deltas: list[OutputDelta] = field(default_factory=list)

    def check(self, expected: list[int], num_faults: int) -> None:
        """Raise AssertionError if the deltas violate an invariant."""
        last = self.deltas[-1]
        assert [delta.usage is not None for delta in self.deltas].index(True) == (
            len(self.deltas) - 1
        ), "exactly the last delta must carry usage"
        if last.error:
            assert last.error == QUARANTINED and num_faults >= 2, last.error
        for index in range(self.ask.num_answers):
            mine = [delta for delta in self.deltas if delta.index == index]
            tokens = [token for delta in mine for token in delta.token_ids]
            ends = [delta.finish_reason for delta in mine if delta.finish_reason]
            assert ends == (["error"] if last.error else ["length"]), f"finish reasons are {ends}"
            wanted = expected[: len(tokens)] if last.error else expected
            assert tokens == wanted, f"output {index}: {tokens}, expected {wanted}"


def play(round_: Round, model: Path, expected: dict[Ask, list[int]]) -> tuple[int, float]:
    """Run a round; return the number of failures that fired and the duration in seconds.

    Raises AssertionError if an invariant is violated.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _faults(round_, Path(folder)):
        histories, restarts = asyncio.run(_serve(round_, model))
        num_faults = len(list(Path(folder).iterdir()))
    assert restarts == 0 or num_faults > 0, "workers were restarted without a failure"
    for history in histories:
        history.check(expected[history.ask][: history.ask.num_tokens], num_faults)
    return num_faults, time.monotonic() - start


@contextmanager
def _faults(round_: Round, folder: Path) -> Iterator[None]:
    rules = [f"{rule}!{folder / str(number)}" for number, rule in enumerate(round_.faults)]
    os.environ[failpoints.VARIABLE] = ";".join(rules)
    timeout, link.PING_TIMEOUT = link.PING_TIMEOUT, 2.0
    try:
        yield
    finally:
        del os.environ[failpoints.VARIABLE]
        link.PING_TIMEOUT = timeout


async def _serve(round_: Round, model: Path) -> tuple[list[History], int]:
    histories = [History(ask) for ask in round_.asks]

    async def talk(engine: AsyncLLM, history: History) -> None:
        await asyncio.sleep(history.ask.after)
        async for delta in engine.chat(history.ask.messages, history.ask.params):
            history.deltas.append(delta)

    async with AsyncLLM(model, tensor_parallel_size=round_.num_ranks, **SETTINGS) as engine:
        await asyncio.wait_for(asyncio.gather(*(talk(engine, h) for h in histories)), 200)
        assert not engine.engine.has_requests
        engine.engine.scheduler.check_integrity()
        return histories, len(engine.engine.restarts.times)


def fault_free(rounds: list[Round], model: Path) -> dict[Ask, list[int]]:
    """Return the tokens of each request in an engine without failures."""
    asks = sorted({ask for round_ in rounds for ask in round_.asks}, key=repr)

    async def answer(engine: AsyncLLM, ask: Ask) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=ask.num_tokens, ignore_eos=True)
        return [t async for delta in engine.chat(ask.messages, params) for t in delta.token_ids]

    async def run() -> dict[Ask, list[int]]:
        async with AsyncLLM(model, **SETTINGS) as engine:
            return {ask: await answer(engine, ask) for ask in asks}

    return asyncio.run(run())


def at_steps(llm: LLM, numbers: set[int], do: Callable[[], None]) -> None:
    """Call `do` each time the engine has sent one of these steps, counting from this call."""
    send, counter = llm.engine.group.send, itertools.count(1)

    def sent(batch: InputBatch, step_id: int) -> None:
        send(batch, step_id)
        if next(counter) in numbers:
            do()

    llm.engine.group.send = sent  # type: ignore[method-assign]


def reproduction(seed: int) -> str:
    return f"python -m octavo.benchmarks.robustness --seed {seed}"


def main(
    seeds: Annotated[str, typer.Option(help="Range of seeds to run, as FIRST:END.")] = "0:20",
    seed: Annotated[int | None, typer.Option(help="Run only this seed.")] = None,
) -> None:
    """Run rounds of random failures; print each failed round as a command that reproduces it."""
    first, _, end = seeds.partition(":")
    numbers = [seed] if seed is not None else list(range(int(first), int(end)))
    rounds = {number: Round.draw(number) for number in numbers}
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_checkpoint(Path(folder))
        expected = fault_free(list(rounds.values()), model)
        failed = False
        for number, round_ in track(rounds.items()):
            try:
                num_faults, seconds = play(round_, model, expected)
                print(f"{number}: {num_faults} faults, {seconds:.1f} s: {' '.join(round_.faults)}")
            except Exception as error:
                failed = True
                print(f"{reproduction(number)}\n  {type(error).__name__}: {error}")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
