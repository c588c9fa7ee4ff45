"""Objects created before a fork raise in the child process, where new ones can be created."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served

START = """
import json, multiprocessing, os, pickle, sys, time
import octavo
MODEL, ADDRESS = sys.argv[1:]
SETTINGS = dict(dtype="float32", max_model_len=512, kv_cache_memory_bytes=8 << 20)
TEXT = [{"role": "user", "content": "Who are you?"}]
FEW = octavo.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

def caught(*calls):
    found = []
    for call in calls:
        try:
            found.append(repr(call()))
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}")
    return found

def in_fork(work):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, json.dumps(work()).encode())
        os.close(writer)
        sys.exit(0)  # runs exit hooks and finalizers, which must not affect the parent
    os.close(writer)
    with open(reader) as file:
        found = json.loads(file.read() or "null")
    assert os.waitpid(child, 0)[1] == 0
    return found

def ask(client):
    return sum(len(delta.token_ids) for delta in client.chat(TEXT, FEW))
"""
ENGINES = """
import asyncio
llm = octavo.LLM(MODEL, **SETTINGS)
before = llm.chat(TEXT, FEW)[0].outputs[0].token_ids
other = octavo.AsyncLLM(MODEL, **SETTINGS)
async def stream():
    return [delta async for delta in other.chat(TEXT, FEW)]
def work():
    found = caught(
        lambda: llm.chat(TEXT, FEW), lambda: llm.generate("a"), lambda: llm.engine.step(),
        lambda: llm.engine.add_request("a", "a"), lambda: llm.engine.abort("a"),
        lambda: llm.engine.preprocess("a"), lambda: asyncio.run(stream()),
        lambda: asyncio.run(other.abort("a")), lambda: asyncio.run(other.tokenize("a")),
    )
    assert caught(llm.close, other.close, llm.engine.close) == ["None"] * 3
    with llm:
        pass
    return found
errors = in_fork(work)
assert llm.chat(TEXT, FEW)[0].outputs[0].token_ids == before
assert sum(len(delta.token_ids) for delta in asyncio.run(stream())) == 3
other.close()
with octavo.LLM(MODEL, **SETTINGS):  # pings are in flight at times with an AsyncLLM
    made = lambda: octavo.LLM(MODEL, **SETTINGS).chat(TEXT, FEW)[0]
    new = in_fork(lambda: len(made().outputs[0].token_ids))
assert llm.chat(TEXT, FEW)[0].outputs[0].token_ids == before
llm.close()
print(json.dumps([errors, new]))
"""
CLIENTS = """
client = octavo.Client(ADDRESS)
never_used = octavo.Client(ADDRESS)
assert ask(client) == 3
def work():
    found = caught(
        lambda: ask(client), lambda: ask(never_used), client.model_info, client.health,
        lambda: client.wait_ready(1), lambda: client.tokenize("a"),
    )
    assert caught(client.close, never_used.close) == ["None"] * 2
    return found + [ask(octavo.Client(ADDRESS))]
*errors, new = in_fork(work)
assert ask(client) == 3 and ask(never_used) == 3
stream = client.chat(TEXT, temperature=0, max_tokens=300, ignore_eos=True)
next(stream)
errors += in_fork(lambda: caught(lambda: next(stream)))
busy = in_fork(lambda: caught(lambda: octavo.Client(ADDRESS), lambda: octavo.LLM(MODEL)))
assert sum(len(delta.token_ids) for delta in stream) > 200
def in_child(queue):
    queue.put(ask(octavo.Client(ADDRESS)))
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=in_child, args=(queue,))
child.start()
assert queue.get(timeout=60) == 3
child.join(60)
assert child.exitcode == 0
sent = caught(lambda: pickle.dumps(client))
print(json.dumps([errors, new, busy, sent]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    server = Served(checkpoint, dtype="float32", max_model_len=1024)
    yield server
    server.close()


def environment() -> dict[str, str]:
    """Return the environment without the variable set by the Ray entry point on import."""
    return {name: text for name, text in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}


def run(script: str, *arguments: str | Path, **variables: str) -> Any:
    command = [sys.executable, "-P", "-c", START + script, *map(str, arguments)]
    env = {**environment(), **variables}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.lesson("L39")
def test_importing_the_package_has_no_side_effects() -> None:
    script = """
import os, sys, threading
before = dict(os.environ)
import octavo
print([before == dict(os.environ), threading.active_count(), "grpc" in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.stdout == "[True, 1, False]\n"


@pytest.mark.lesson("L39")
def test_engines_are_rejected_in_a_fork_and_new_ones_work(checkpoint: Path) -> None:
    errors, new = run(ENGINES, checkpoint, "")
    assert len(errors) == 9 and new == 3
    for error in errors:
        assert error.startswith("EngineDead: ") and "create a new one in this process" in error


@pytest.mark.lesson("L39")
def test_clients_are_rejected_in_a_fork_and_new_ones_work(checkpoint: Path, served: Served) -> None:
    errors, new, busy, sent = run(CLIENTS, checkpoint, served.address)
    assert len(errors) == 7 and new == 3
    for error in errors:
        assert error.startswith("ClientError: FAILED_PRECONDITION: "), error
        assert "create a new one in this process" in error
    for error, kind in zip(busy, ("ClientError", "ConfigError"), strict=True):
        assert error.startswith(kind) and "its parent had calls in flight" in error
    assert len(sent) == 1 and "cannot be sent to another process; create one" in sent[0]


WITHOUT_SUPPORT = """
assert ask(octavo.Client(ADDRESS)) == 3
made = in_fork(lambda: caught(lambda: octavo.Client(ADDRESS), lambda: octavo.LLM(MODEL)))
print(json.dumps(made))
"""


@pytest.mark.lesson("L39")
def test_new_objects_are_rejected_where_grpcs_fork_support_is_off(
    checkpoint: Path, served: Served
) -> None:
    errors = run(WITHOUT_SUPPORT, checkpoint, served.address, GRPC_ENABLE_FORK_SUPPORT="0")
    assert len(errors) == 2 and all("unset that variable" in error for error in errors)


def test_no_process_is_started_with_a_hook_that_forks() -> None:
    """subprocess forks Python code only for preexec_fn; without it gRPC's threads do no harm."""
    root = Path(__file__).resolve().parents[2]
    for folder in ("engine", "benchmarks", "kernels"):
        for path in (root / folder).rglob("*.py"):
            assert "preexec_fn" not in path.read_text(), path


STARTS = """
import threading
from octavo.engine.worker.process import WORKER_MODULE
import subprocess
client = octavo.Client(ADDRESS)
def busy():
    while True:
        ask(client)
for _ in range(4):
    threading.Thread(target=busy, daemon=True).start()
time.sleep(0.5)
command = [sys.executable, "-P", "-m", WORKER_MODULE, "--help"]
statuses = []
for _ in range(300):
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               start_new_session=True)
    statuses.append(started.wait(60))
print(json.dumps(statuses))
os._exit(0)
"""


@pytest.mark.lesson("L39")
@pytest.mark.slow
def test_no_worker_dies_of_grpc_threads_in_300_starts(checkpoint: Path, served: Served) -> None:
    assert run(STARTS, checkpoint, served.address) == [0] * 300


CELERY_TASKS = """
import faulthandler, os, signal
import celery, octavo
faulthandler.register(signal.SIGUSR1)
folder, address = os.environ["TASKS_FOLDER"], os.environ["ADDRESS"]
app = celery.Celery("tasks", broker="filesystem://", backend=f"file://{folder}/results")
app.conf.broker_transport_options = {
    "data_folder_in": f"{folder}/queue", "data_folder_out": f"{folder}/queue",
    "control_folder": f"{folder}/control",
}
client = octavo.Client(address)
client.model_info()  # so that its channel is in use before the fork

def ask(used):
    messages = [{"role": "user", "content": "Who are you?"}]
    deltas = used.chat(messages, temperature=0, max_tokens=3, ignore_eos=True)
    return sum(len(delta.token_ids) for delta in deltas)

@app.task
def with_the_parents_client():
    try:
        return ask(client)
    except octavo.engine.client.client.ClientError as error:
        return str(error)

@app.task
def with_a_new_client():
    return ask(octavo.Client(address))
"""
CELERY_CALLER = """
import os, tasks
calls = [tasks.with_the_parents_client.delay(), *(tasks.with_a_new_client.delay() for _ in "ab")]
print([call.get(timeout=90) for call in calls], flush=True)
os._exit(0)
"""


@pytest.mark.lesson("L39")
def test_clients_in_celerys_prefork_pool(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("celery")
    for name in ("queue", "control", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "tasks.py").write_text(CELERY_TASKS)
    env = {**environment(), "TASKS_FOLDER": str(tmp_path), "ADDRESS": served.address}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    options = ["worker", "--pool", "prefork", "--concurrency", "2", "--loglevel", "error"]
    with subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", *options], env=env, cwd=tmp_path
    ) as worker:
        try:
            command = [sys.executable, "-c", CELERY_CALLER]
            done = subprocess.run(
                command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
        finally:
            worker.terminate()
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                main = psutil.Process(worker.pid)
                for process in [*main.children(), main]:
                    process.send_signal(signal.SIGUSR1)  # where it hangs
                    time.sleep(1)
                    process.kill()
                raise
    error, *counts = ast.literal_eval(done.stdout or f"[{done.stderr!r}]")
    assert "create a new one in this process" in error and counts == [3, 3]


PROCESSES = """
import concurrent.futures, multiprocessing, sys
import octavo

def ask(address):
    messages = [{"role": "user", "content": "Who are you?"}]
    deltas = octavo.Client(address).chat(messages, temperature=0, max_tokens=3, ignore_eos=True)
    return sum(len(delta.token_ids) for delta in deltas)

if __name__ == "__main__":
    found = [ask(sys.argv[1])]
    for method in ("spawn", "forkserver", "fork"):
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
            found += pool.map(ask, [sys.argv[1]] * 2)
    print(found)
"""


@pytest.mark.lesson("L39")
def test_new_clients_in_every_kind_of_process(served: Served, tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(PROCESSES)
    command = [sys.executable, tmp_path / "ask.py", served.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.stdout == f"{[3] * 7}\n", done.stderr
