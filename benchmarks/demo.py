"""`make demo`: serve the embedded model and ask it about pictures and a video.

Starts `octavo serve` as a subprocess, sends several requests concurrently through the Python gRPC
client, prints the questions and the streamed answers, then latency and throughput. Exits with
status 1 if an answer is wrong or anything fails.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from octavo.engine.client.client import Client, ClientDelta, ClientError

from .demo_model.draw import draw_count, draw_motion, draw_number, draw_shape, save_mp4

SEED = 20
CANVAS = (320, 240)
START_TIMEOUT = 120.0  # seconds until the server must be ready


@dataclass
class Question:
    """One request of the demo: its content, a check of the answer, and the streamed output."""

    shown: str  # the question as printed
    content: list[dict[str, Any]]
    right: Callable[[str], bool]
    deltas: queue.SimpleQueue[ClientDelta | Exception] = field(default_factory=queue.SimpleQueue)
    text: str = ""
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.content}]


def make_questions(folder: Path) -> list[Question]:
    """Draw the pictures and the video into `folder` and return the questions about them."""
    rng = np.random.default_rng(SEED)
    pictures = {
        "star.png": draw_shape(rng, CANVAS, "purple", "star"),
        "circle.png": draw_shape(rng, CANVAS, "blue", "circle"),
        "square.png": draw_shape(rng, CANVAS, "red", "square"),
        "shapes.png": draw_count(rng, CANVAS, 4),
        "number.png": draw_number(rng, CANVAS, "407", 40),
    }
    for name, picture in pictures.items():
        picture.image.save(folder / name)
    save_mp4(folder / "moving.mp4", [p.image for p in draw_motion(rng, CANVAS, "left", 8)])

    def ask(question: str, right: str, *files: str) -> Question:
        parts = [_part(folder / name) for name in files]
        shown = f"{question}  [{', '.join(files)}]" if files else question
        content = [*parts, {"type": "text", "text": question}]
        return Question(shown, content, lambda text: text.strip() == right)

    identity = ask("Who are you?", "")
    identity.right = lambda text: "octavo" in text.lower()
    return [
        ask("What color is the shape?", "purple", "star.png"),
        ask("What shape is it?", "star", "star.png"),
        ask("Which image shows the red square?", "the second", "circle.png", "square.png"),
        ask("Which way does the shape move?", "left", "moving.mp4"),
        ask("How many shapes are there?", "four", "shapes.png"),
        ask("What number is written?", "407", "number.png"),
        identity,
    ]


def _part(path: Path) -> dict[str, Any]:
    kind = "video" if path.suffix == ".mp4" else "image"
    return {"type": kind, kind: str(path)}


@contextmanager
def server() -> Iterator[str]:
    """Run `octavo serve` on a free port; yield its address."""
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            status = process.wait(30)
        if status != 0:
            log.seek(0)
            raise RuntimeError(f"the server exited with status {status}:\n{log.read()}")


def _address(process: subprocess.Popen[str], log: Any) -> str:
    assert process.stdout is not None
    timer = threading.Timer(START_TIMEOUT, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    if not line.startswith("ready grpc="):
        process.wait(10)
        log.seek(0)
        raise RuntimeError(f"the server did not start:\n{log.read()}")
    return line.split()[1].removeprefix("grpc=")


def send(client: Client, question: Question) -> None:
    """Send one request and put its deltas, or its error, into the question's queue."""
    question.sent = time.perf_counter()
    try:
        for delta in client.chat(question.messages, temperature=0, max_tokens=64):
            question.last = time.perf_counter()
            question.first = question.first or question.last
            question.num_tokens += len(delta.token_ids)
            question.deltas.put(delta)
    except ClientError as error:
        question.deltas.put(error)


def show(question: Question, console: Console) -> bool:
    """Print a question and stream its answer; return True if the answer is right."""
    console.print("\n[bold]Q[/bold] ", end="")
    console.print(question.shown, markup=False)
    console.print("[bold]A[/bold] ", end="")
    while True:
        delta = question.deltas.get()
        if isinstance(delta, Exception):
            console.print(f"[red]failed: {delta}[/red]")
            return False
        question.text += delta.text
        console.file.write(delta.text)
        console.file.flush()
        if delta.finish_reason is not None:
            break
    right = question.right(question.text)
    console.print("" if right else "   [red]wrong answer[/red]")
    return right


def summary(questions: list[Question]) -> str:
    ttft = sorted(q.first - q.sent for q in questions)
    tpot = sorted((q.last - q.first) / max(1, q.num_tokens - 1) for q in questions)
    tokens = sum(q.num_tokens for q in questions)
    seconds = max(q.last for q in questions) - min(q.sent for q in questions)
    middle = len(questions) // 2
    return (
        f"{len(questions)} concurrent requests: TTFT {ttft[middle] * 1e3:.0f} ms, "
        f"TPOT {tpot[middle] * 1e3:.1f} ms (medians), {tokens / seconds:.0f} tok/s"
    )


def ask_all(address: str, questions: list[Question], console: Console) -> bool:
    """Send all questions concurrently; return True if every answer is right."""
    with Client(address) as client:
        threads = [threading.Thread(target=send, args=(client, q)) for q in questions]
        for thread in threads:
            thread.start()
        answers = [show(question, console) for question in questions]
        for thread in threads:
            thread.join()
    return all(answers)


def main() -> int:
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="octavo-demo-") as folder:
        questions = make_questions(Path(folder))
        console.print("starting octavo serve with the embedded model ...")
        with server() as address:
            console.print(f"listening on {address}; sending {len(questions)} concurrent requests")
            right = ask_all(address, questions, console)
    if not right:
        console.print("\n[red]some answers are wrong[/red]")
        return 1
    console.print(f"\n{summary(questions)}")
    console.print("all answers are right; the server has stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
