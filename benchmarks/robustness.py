"""Random faults under load: what every client saw is held against a run without faults.

    python -m octavo.benchmarks.robustness --seeds 0:20
    python -m octavo.benchmarks.robustness --seed 17

A seed draws ranks, requests (texts, images, several answers, at random moments) and faults: a
worker is killed, hangs, gives up, raises or runs out of memory at some boundary of some step.
Every request must end once, with each token that it has without faults, none lost and none twice;
and nothing may be left. After the manner of etcd's robustness tests.
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
    """A request: what it asks, and when."""

    text: str
    image_seed: int | None
    num_tokens: int
    num_answers: int
    after: float  # seconds from the round's beginning

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
    faults: tuple[str, ...]  # failpoint rules, but for the file that makes each happen once

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
    """What one client saw, in order."""

    ask: Ask
    deltas: list[OutputDelta] = field(default_factory=list)

    def check(self, expected: list[int], num_faults: int) -> None:
        """Raises AssertionError for what must not be."""
        last = self.deltas[-1]
        assert [delta.usage is not None for delta in self.deltas].index(True) == (
            len(self.deltas) - 1
        ), "a delta after the last, or no last one"
        if last.error:
            assert last.error == QUARANTINED and num_faults >= 2, last.error
        for index in range(self.ask.num_answers):
            mine = [delta for delta in self.deltas if delta.index == index]
            tokens = [token for delta in mine for token in delta.token_ids]
            ends = [delta.finish_reason for delta in mine if delta.finish_reason]
            assert ends == (["error"] if last.error else ["length"]), f"ended with {ends}"
            wanted = expected[: len(tokens)] if last.error else expected
            assert tokens == wanted, f"answer {index}: {tokens} and not {wanted}"


def play(round_: Round, model: Path, expected: dict[Ask, list[int]]) -> tuple[int, float]:
    """Runs a round; the number of faults that happened, and its seconds. Raises AssertionError."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _faults(round_, Path(folder)):
        histories, restarts = asyncio.run(_serve(round_, model))
        num_faults = len(list(Path(folder).iterdir()))
    assert restarts == 0 or num_faults > 0, "workers were started anew for no fault"
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
    """The tokens that each request has in an engine without faults."""
    asks = sorted({ask for round_ in rounds for ask in round_.asks}, key=repr)

    async def answer(engine: AsyncLLM, ask: Ask) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=ask.num_tokens, ignore_eos=True)
        return [t async for delta in engine.chat(ask.messages, params) for t in delta.token_ids]

    async def run() -> dict[Ask, list[int]]:
        async with AsyncLLM(model, **SETTINGS) as engine:
            return {ask: await answer(engine, ask) for ask in asks}

    return asyncio.run(run())


def at_steps(llm: LLM, numbers: set[int], do: Callable[[], None]) -> None:
    """Does something each time that the engine has just sent one of these steps, counted from
    now on."""
    send, counter = llm.engine.group.send, itertools.count(1)

    def sent(batch: InputBatch, step_id: int) -> None:
        send(batch, step_id)
        if next(counter) in numbers:
            do()

    llm.engine.group.send = sent  # type: ignore[method-assign]


def reproduction(seed: int) -> str:
    return f"python -m octavo.benchmarks.robustness --seed {seed}"


def main(
    seeds: Annotated[str, typer.Option(help="FIRST:END of the rounds to play.")] = "0:20",
    seed: Annotated[int | None, typer.Option(help="Play this one alone.")] = None,
) -> None:
    """Play rounds of random faults; print each that fails as the line that repeats it."""
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
