"""`octavo.Engine` within a program of another stack's: one process with Ray, under the versions of
protobuf and gRPC that Ray and vLLM allow.

Ray 2.60 asks for protobuf >= 3.20.3 and grpcio >= 1.42; vLLM 0.33 for protobuf >= 5.29.6 but for
6.30 to 6.33.4 (no 6 is older), and by OpenTelemetry for grpcio >= 1.63.2; we for protobuf >= 4.25
and grpcio >= 1.62. The newest are those that the whole suite runs with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json
import ray

options = dict(num_cpus=1, include_dashboard=False, log_to_driver=False)
ray.init(address="local", _node_ip_address="127.0.0.1", **options)  # not one that runs here

import google.protobuf
import grpc
import octavo

@ray.remote
def double(number):
    return 2 * number

with octavo.Engine(dtype="float32", max_model_len=512, kv_cache_memory_bytes=8 << 20) as engine:
    messages = [{"role": "user", "content": "Who are you?"}]
    engine.add_request("a", {"messages": messages}, octavo.SamplingParams(temperature=0))
    text, later = "", double.remote(21)
    while engine.has_requests:
        text += "".join(delta.text for delta in engine.step())
    print(json.dumps([google.protobuf.__version__, grpc.__version__, text, ray.get(later)]))
ray.shutdown()
"""
FORKS = """
import json
import os
import time

import octavo

def start() -> int:
    child = os.fork()
    if not child:  # what `subprocess` does with `preexec_fn`, but slowly
        os.closerange(3, 1024)
        time.sleep(0.1)
        os.execvp("true", ["true"])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

with octavo.Engine(dtype="float32", max_model_len=512, kv_cache_memory_bytes=8 << 20) as engine:
    print(json.dumps([start() for _ in range(20)]))
"""
BESIDE = ("grpcio-health-checking", "grpcio-reflection", "grpcio-status")
# What Ray imports and pip would choose otherwise with an older protobuf.
LOOSE = ("googleapis-common-protos", "google-api-core")


def run(paths: list[str], program: str = PROGRAM, **variables: str) -> list[Any]:
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **variables}
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_engine_runs_beside_ray() -> None:
    *_, text, doubled = run([])
    assert "Octavo" in text and doubled == 42


def test_programs_start_beside_the_engine() -> None:
    """As `ray.init` starts its own, with the variable that docs/scaling.md names."""
    assert run([], FORKS, GRPC_ENABLE_FORK_SUPPORT="0") == [0] * 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protobuf", "grpcio"),
    [
        ("4.25.8", "1.62.3"),  # our least
        ("5.29.6", "1.63.2"),  # vLLM's least, and its last before what it leaves out
        ("6.33.5", "1.78.0"),  # its first behind that
    ],
)
def test_the_engine_runs_beside_ray_with(protobuf: str, grpcio: str, tmp_path: Path) -> None:
    """The versions lie before those of the environment on the path: torch is not copied."""
    wanted = [f"protobuf=={protobuf}", *(f"{name}=={grpcio}" for name in ("grpcio", *BESIDE))]
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path)]
    subprocess.run([*command, *wanted, *LOOSE], check=True, capture_output=True, timeout=240)
    *versions, text, doubled = run([str(tmp_path)])
    assert versions == [protobuf, grpcio]
    assert "Octavo" in text and doubled == 42
