"""The Triton kernels themselves: run in the interpreter, and compiled for GPUs that are not here.

Each in a process of its own, since the interpreter's switch changes what `triton.jit` makes.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.benchmarks.kernel_resources import SHAPES, SHARED_LIMIT, TARGETS

HERE = Path(__file__).parent


def test_kernels_in_the_interpreter() -> None:
    """`test_kernels.py` once more, with the kernels instead of the CPU paths."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_kernels.py"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 100


@pytest.fixture(scope="module")
def resources() -> list[dict[str, str | int]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "octavo.benchmarks.kernel_resources", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(resources: list[dict[str, str | int]], target: str) -> None:
    """Registers, spills and shared memory of each kernel at each shape; `-s` prints them."""
    rows = [row for row in resources if row["target"] == target]
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) == 9
    assert {(row["kernel"], row["shape"]) for row in rows} == {
        (kernel, shape) for kernel in kernels for shape in SHAPES
    }
    for row in rows:
        print(row)
        assert row["spills"] == 0, row
        assert 0 < int(row["registers"]) <= (512 if target == "gfx942" else 255), row
        assert int(row["shared"]) <= SHARED_LIMIT[target], row
