"""`octavo.Engine` embedded in a program with Ray, with the protobuf and gRPC versions of others.

Ray 2.60 requires protobuf >= 3.20.3 and grpcio >= 1.42; vLLM 0.33 requires protobuf >= 5.29.6
except 6.30 to 6.33.4 (no older 6.x), and grpcio >= 1.63.2 through OpenTelemetry; Octavo requires
protobuf >= 4.25 and grpcio >= 1.62. The whole test suite runs with the newest versions.
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
GRPC_PACKAGES = ("grpcio-health-checking", "grpcio-reflection", "grpcio-status")
# Ray imports these, and pip would otherwise choose them with an older protobuf.
LOOSE = ("googleapis-common-protos", "google-api-core")


def run(paths: list[str], program: str = PROGRAM, **variables: str) -> list[Any]:
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **variables}
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_engine_runs_alongside_ray() -> None:
    *_, text, doubled = run([])
    assert "Octavo" in text and doubled == 42


def test_subprocesses_start_alongside_the_engine() -> None:
    """Start them as `ray.init` does, with the variable documented in docs/scaling.md."""
    assert run([], FORKS, GRPC_ENABLE_FORK_SUPPORT="0") == [0] * 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protobuf", "grpcio"),
    [
        ("4.25.8", "1.62.3"),  # our minimum
        ("5.29.6", "1.63.2"),  # vLLM's minimum, the last before its excluded range
        ("6.33.5", "1.78.0"),  # the first after that range
    ],
)
def test_engine_runs_alongside_ray_with_versions(
    protobuf: str, grpcio: str, tmp_path: Path
) -> None:
    """These versions precede the environment's on the path, so torch need not be installed."""
    wanted = [
        f"protobuf=={protobuf}",
        *(f"{name}=={grpcio}" for name in ("grpcio", *GRPC_PACKAGES)),
    ]
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path)]
    subprocess.run([*command, *wanted, *LOOSE], check=True, capture_output=True, timeout=240)
    *versions, text, doubled = run([str(tmp_path)])
    assert versions == [protobuf, grpcio]
    assert "Octavo" in text and doubled == 42
