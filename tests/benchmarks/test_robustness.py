"""Rounds of random faults: no stream loses or repeats a token. And the checker is no fool."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.robustness import History, Round, fault_free, play, reproduction
from octavo.engine.errors import RequestError
from octavo.engine.outputs import OutputDelta, Usage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


FAILURE = RequestError("INTERNAL", "x")


def play_all(seeds: range, model: Path) -> None:
    rounds = {seed: Round.draw(seed) for seed in seeds}
    expected = fault_free(list(rounds.values()), model)
    happened = 0
    for seed, round_ in rounds.items():
        try:
            happened += play(round_, model, expected)[0]
        except AssertionError as error:
            pytest.fail(f"{reproduction(seed)}\n{error}")
    assert happened >= len(seeds) // 2


def test_rounds(model: Path) -> None:
    play_all(range(2), model)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2, 202, 25))
def test_many_rounds(model: Path, first: int) -> None:
    play_all(range(first, first + 25), model)


def delta(token: int, **more: Any) -> OutputDelta:
    return OutputDelta("a", token_ids=(token,), **more)


LAST = {"finish_reason": "length", "usage": Usage(1, 3)}
GOOD = [delta(7), delta(8), delta(9, **LAST)]


@pytest.mark.parametrize(
    "deltas",
    [
        [delta(7), delta(9, **LAST)],  # one lost
        [delta(7), delta(8), delta(8), delta(9, **LAST)],  # one twice
        [delta(7), delta(8), delta(6, **LAST)],  # another
        [delta(7), delta(8), delta(9)],  # no end
        [*GOOD, delta(9)],  # after the end
        [
            delta(7),
            delta(8),
            delta(
                9, failure=RequestError("INTERNAL", "x"), finish_reason="error", usage=Usage(1, 3)
            ),
        ],
    ],
)
def test_the_checker_sees_it(deltas: list[OutputDelta]) -> None:
    ask = replace(Round.draw(0).asks[0], num_answers=1)
    History(ask, GOOD).check([7, 8, 9], 1)
    with pytest.raises((AssertionError, ValueError)):
        History(ask, deltas).check([7, 8, 9], 1)
