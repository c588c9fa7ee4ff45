"""The tests of kernels once more in Triton's interpreter: the kernels instead of the CPU paths.

In processes of their own, since the interpreter's switch changes what `triton.jit` makes; side by
side, since each computes on one core for a minute.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES: dict[str, tuple[str, ...]] = {
    "base": ("test_kernels.py", "test_gpu.py", "test_decode_graph.py"),
    "quantized": (
        "test_fp8_cache.py",
        "test_fp8_serving.py",
        "test_fp8_linear.py",
        "test_int4_linear.py",
        "test_quantized_checkpoints.py::test_kernel_form",
    ),
}
LEAST = {"base": 100, "quantized": 100}  # tests that pass


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    started = {}
    for name, files in SUITES.items():
        output = (tmp_path_factory.mktemp(name) / "output").open("w+")
        started[name] = subprocess.Popen(
            [*command, *files], cwd=HERE, env=env, stdout=output, stderr=output, text=True
        )
        started[name].stdout = output
    yield started
    for process in started.values():
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.timeout(900)  # minutes of work for one core, which other tests share
@pytest.mark.parametrize("name", SUITES)
def test_in_the_interpreter(suites: dict[str, subprocess.Popen[str]], name: str) -> None:
    process = suites[name]
    status = process.wait()
    assert process.stdout is not None
    process.stdout.seek(0)
    output = process.stdout.read()
    assert status == 0, output[-4000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= LEAST[name], output[-4000:]
