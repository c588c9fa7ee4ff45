"""Measure how long a stream stalls when a worker is killed or hangs.

python -m octavo.benchmarks.recovery [--model DIR]
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from octavo.engine.core.engine import Engine
from octavo.scheduler.params import SamplingParams


def longest_gap(engine: Engine, signum: int | None, prompt_len: int) -> float:
    """Return the longest time in seconds between two tokens of a stream of 24.

    After the 8th token, rank 0 receives the signal `signum`.
    """
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompt = {"prompt_token_ids": [number % 200 for number in range(prompt_len)]}
    request_id = engine.add_request(None, prompt, params)
    times: list[float] = []
    while engine.has_requests:
        for delta in engine.step():
            if delta.request_id == request_id and delta.token_ids:
                times.append(time.monotonic())
        if len(times) == 8 and signum is not None:
            os.kill(engine.worker_pids[0], signum)
            signum = None
    return max(after - before for before, after in itertools.pairwise(times))


def main(
    model: Annotated[Path | None, typer.Option(help="Default: the embedded model.")] = None,
    prompt_len: Annotated[
        int, typer.Option(help="Prompt tokens, recomputed after the restart.")
    ] = 256,
) -> None:
    """Print the longest time between two tokens: without a failure, after a kill, after a hang."""
    with Engine(model, max_model_len=1024, max_restarts=9) as engine:
        longest_gap(engine, None, prompt_len)  # warm up
        for name, signum in (
            ("none", None),
            ("SIGKILL", signal.SIGKILL),
            ("SIGSTOP", signal.SIGSTOP),
        ):
            print(f"{name}: {longest_gap(engine, signum, prompt_len):.2f} s")


if __name__ == "__main__":
    typer.run(main)
