"""Collectives through memory that ranks share: against the sums and joins written out here, by
ranks that are processes, in any order of arrival, over any number of slots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.model.shared_memory import SLOT
from octavo.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels")

# A rank: it makes the calls of `ROUNDS` and saves what they gave. Some come late.
RANK = """
import sys, time
import numpy as np, torch
from octavo.engine.model.shared_memory import SharedMemory
torch.set_num_threads(1)
file, rank, size, seed, turn, out = *map(int, sys.argv[1:6]), sys.argv[6]
memory = SharedMemory(file, rank, size)
memory._turn = turn
rng = np.random.default_rng([seed, rank])
plan = np.random.default_rng(seed)
found = []
for kind, dtype, rows, columns, source in eval(sys.argv[7]):
    if rng.random() < 0.2:
        time.sleep(rng.random() * 0.01)
    x = torch.from_numpy(rng.integers(-8, 8, (rows, columns))).to(getattr(torch, dtype))
    if kind == "sum":
        memory.all_reduce(x)
    elif kind == "gather":
        x = memory.gather(x)
    else:
        memory.broadcast(x, source)
    found.append(None if x is None else x.double().numpy())
np.savez(out, *[np.zeros(0) if each is None else each for each in found])
"""


def rounds(size: int, seed: int) -> list[tuple[str, str, int, int, int]]:
    rng = np.random.default_rng(seed)
    found = [
        ("sum", "bfloat16", 300, 3584, 0),  # over several slots
        ("gather", "float32", 40, SLOT // 64, 0),
        ("broadcast", "int64", 1, SLOT // 4, size - 1),
        ("broadcast", "uint8", 3, 5, 0),
        ("sum", "float16", 1, 1, 0),
        ("gather", "bfloat16", 1, 1, 0),
    ]
    for _ in range(300):
        kind = ("sum", "gather", "broadcast")[rng.integers(3)]
        dtype = ("float32", "bfloat16")[rng.integers(2)]
        sizes = (int(rng.integers(1, 20)), int(rng.integers(1, 400)))
        found.append((kind, dtype, *sizes, int(rng.integers(size))))
    return found


def expected(size: int, seed: int, rank: int) -> list[np.ndarray]:
    """All numbers are whole and small: every dtype has their sums exactly."""
    rngs = [np.random.default_rng([seed, each]) for each in range(size)]
    found = []
    for kind, dtype, rows, columns, source in rounds(size, seed):
        given = []
        for rng in rngs:
            if rng.random() < 0.2:
                rng.random()
            x = torch.from_numpy(rng.integers(-8, 8, (rows, columns)))
            given.append(x.to(getattr(torch, dtype)).double().numpy())
        joined = np.concatenate(given, axis=1) if rank == 0 else np.zeros(0)
        found.append({"sum": sum(given), "gather": joined, "broadcast": given[source]}[kind])
    return found


@pytest.mark.parametrize(("size", "turn"), [(2, 0), (3, 2**32 - 50), (4, 2**31 - 50)])
def test_ranks_that_are_processes(tmp_path: Path, size: int, turn: int) -> None:
    """`turn`: of the first call; the count in the memory goes round."""
    file = os.memfd_create("test")
    if turn:
        os.truncate(file, 64 * size)
        for rank in range(size):
            os.pwrite(file, (turn % 2**32).to_bytes(4, "little"), 64 * rank)
    plan = repr(rounds(size, 7))
    command = [sys.executable, "-P", "-c", RANK, str(file)]
    outs = [tmp_path / f"{rank}.npz" for rank in range(size)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), "7", str(turn), str(outs[rank]), plan], pass_fds=[file]
        )
        for rank in range(size)
    ]
    os.close(file)
    assert [rank.wait(120) for rank in ranks] == [0] * size
    for rank in range(size):
        with np.load(outs[rank]) as saved:
            for found, wanted in zip(saved.values(), expected(size, 7, rank), strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_an_engines_ranks_take_it_and_nothing_is_left(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path)
    with octavo.LLM(checkpoint, dtype="float32", max_model_len=64, tensor_parallel_size=2) as llm:
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in llm.engine.worker_pids]
        names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert all("memfd:octavo-ranks" in each for each in maps)
    assert not any("octavo-ranks" in name for name in names)
