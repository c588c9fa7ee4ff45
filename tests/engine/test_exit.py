"""Scripts that do not close their objects exit in any state and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served

MARK = "OCTAVO_TEST_MARK"
START = """
import asyncio, os, signal, sys, threading, time
from PIL import Image
import octavo
MODEL, ADDRESS, VIDEO = sys.argv[1:]
SETTINGS = dict(dtype="float32", max_model_len=1024, kv_cache_memory_bytes=16 << 20)
TEXT = [{"role": "user", "content": "Who are you?"}]
def ask(kind, source):
    parts = [{"type": kind, kind: source}, {"type": "text", "text": "hi"}]
    return [{"role": "user", "content": parts}]
PICTURE = Image.new("RGB", (56, 56))
FEW = octavo.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
MANY = octavo.SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
def LLM(**more): return octavo.LLM(MODEL, **SETTINGS, **more)
def run(target):
    def quiet():
        try: target()
        except Exception: pass  # the engine is closed at exit
    threading.Thread(target=quiet, daemon=True).start()
"""
# name: script, exit status, whether a traceback is expected
CASES: dict[str, tuple[str, int, bool]] = {
    "image_step": ("llm = LLM(); llm.chat(ask('image', PICTURE), FEW)", 0, False),
    "isolated": ("llm = LLM(isolate_media=True); llm.chat(ask('image', PICTURE), FEW)", 0, False),
    "no_request": ("llm = LLM()", 0, False),
    "engine_alone": (
        "e = octavo.Engine(MODEL, **SETTINGS); e.add_request('a', {'messages': TEXT}, MANY)\n"
        "e.step(); e.step()",
        0,
        False,
    ),
    "exception": ("llm = LLM(); llm.chat(TEXT, FEW); raise KeyError('x')", 1, True),
    "sys_exit": ("llm = LLM(); llm.chat(TEXT, FEW); sys.exit(7)", 7, False),
    "sys_exit_in_a_thread": (
        "llm = LLM()\ndef work():\n    llm.chat(TEXT, FEW)\n    sys.exit(3)\n"
        "threading.Thread(target=work).start()",
        0,
        False,
    ),
    "thread_outlives_main": (
        "llm = LLM()\ndef work():\n    time.sleep(0.5)\n"
        "    print('said', len(llm.chat(TEXT, FEW)[0].outputs[0].token_ids), flush=True)\n"
        "threading.Thread(target=work).start()",
        0,
        False,
    ),
    "daemon_thread": (
        "llm = LLM(); run(lambda: llm.chat(TEXT, MANY))\n"
        "while not llm.engine.has_requests: time.sleep(0.01)",
        0,
        False,
    ),
    "loading_in_a_daemon_thread": ("run(LLM); time.sleep(1.5)", 0, False),
    "interrupted": (
        "llm = LLM(); threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "while True: llm.chat(TEXT, MANY)",
        -signal.SIGINT,
        True,
    ),
    "interrupted_while_loading": (
        "threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start(); llm = LLM()\n"
        "while True: time.sleep(1)",
        -signal.SIGINT,
        True,
    ),
    "os_exit": ("llm = LLM(isolate_media=True); llm.chat(TEXT, FEW); os._exit(4)", 4, False),
    "terminated": (
        "llm = LLM(isolate_media=True); run(lambda: llm.chat(TEXT, MANY)); time.sleep(0.3)\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
        -signal.SIGTERM,
        False,
    ),
    "video_in_flight": (
        "llm = LLM(isolate_media=True); run(lambda: llm.chat(ask('video', VIDEO), MANY))\n"
        "time.sleep(0.3)",
        0,
        False,
    ),
    "video_in_flight_in_this_process": (
        "llm = LLM(); run(lambda: llm.chat(ask('video', VIDEO), MANY)); time.sleep(0.3)",
        0,
        False,
    ),
    "structured_output": (
        "from dataclasses import replace\nllm = LLM()\n"
        "form = replace(MANY, structured=octavo.StructuredOutput(regex='[a-z]*'))\n"
        "run(lambda: llm.chat(TEXT, form)); time.sleep(0.3)",
        0,
        False,
    ),
    "async_not_closed": (
        "async def main():\n    engine = octavo.AsyncLLM(MODEL, **SETTINGS)\n"
        "    async for delta in engine.chat(ask('image', PICTURE), MANY): break\n"
        "asyncio.run(main())",
        0,
        False,
    ),
    "async_global_not_closed": (
        "engine = None\nasync def main():\n    global engine, stream\n"
        "    engine = octavo.AsyncLLM(MODEL, isolate_media=True, **SETTINGS)\n"
        "    stream = engine.chat(TEXT, MANY)\n    await anext(stream)\n"
        "asyncio.run(main())",
        0,
        False,
    ),
    "client_stream": (
        "c = octavo.Client(ADDRESS); stream = c.chat(TEXT, MANY); next(stream)",
        0,
        False,
    ),
    "client_stream_in_a_daemon_thread": (
        "c = octavo.Client(ADDRESS); run(lambda: list(c.chat(TEXT, MANY))); time.sleep(0.3)",
        0,
        False,
    ),
    "client_stream_in_a_function": (
        "def f():\n    stream = octavo.Client(ADDRESS).chat(TEXT, MANY)\n    next(stream)\n"
        "    return stream\nkept = f()",
        0,
        False,
    ),
    "in_a_cycle": (
        "llm = LLM(); llm.me = llm; llm.chat(ask('image', PICTURE), FEW); del llm",
        0,
        False,
    ),
    "killed": (
        "llm = LLM(isolate_media=True); llm.chat(ask('image', PICTURE), FEW)\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        -signal.SIGKILL,
        False,
    ),
    "killed_with_stopped_children": (
        "llm = LLM(isolate_media=True); llm.chat(ask('image', PICTURE), FEW)\n"
        "import psutil\nchildren = psutil.Process().children()\nassert len(children) >= 2\n"
        "for child in children: child.suspend()\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        -signal.SIGKILL,
        False,
    ),
}
QUICK = ("image_step", "isolated", "daemon_thread", "async_global_not_closed", "client_stream")
QUICK += ("thread_outlives_main", "killed_with_stopped_children", "in_a_cycle")


LIMIT = 60.0  # seconds; the scripts take about five on a busy machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    server = Served(checkpoint, dtype="float32", max_model_len=1024)
    yield server
    server.close()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video large enough that the script exits during its decoding."""
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height = 640, 480
        for index in range(300):
            picture = np.full((480, 640, 3), index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def marked(mark: str) -> list[int]:
    """Return the processes with the mark in their environment, except zombies."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for_none(mark: str) -> list[int]:
    """Wait for children that exit with their parent; return the processes that remain."""
    deadline = time.monotonic() + 10
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.lesson("L40")
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_script_exits_and_leaves_nothing_behind(
    name: str, checkpoint: Path, served: Served, video: Path, tmp_path: Path
) -> None:
    script, status, has_traceback = CASES[name]
    mark, folder = uuid.uuid4().hex, tmp_path / "tmp"
    folder.mkdir()
    command = [sys.executable, "-P", "-c", START + script, checkpoint, served.address, video]
    done = subprocess.run(
        command,
        env={**os.environ, MARK: mark, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    left = wait_for_none(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert done.returncode == status, done.stderr
    assert ("Traceback" in done.stderr) == has_traceback, done.stderr
    assert not left, "processes are left"
    assert not list(folder.iterdir()), "files are left"
    if name == "thread_outlives_main":
        assert done.stdout == "said 2\n"
