"""Compare engines on one workload, run in alternation (A B A B ...).

    python -m octavo.benchmarks.compare octavo vllm --model DIR --vllm-python /tmp/vllm/bin/python
    python -m octavo.benchmarks.compare octavo octavo:quantization=int8 vllm --model DIR --rounds 5

Each engine is a process that loads the model once and then runs each round (`engines.py`). Ratios
are relative to the last engine on the command line, in the same round. All engines get the same
prompts in a round; each round has new prompts, unless they come from a file.

Choose media sizes that no engine resizes, or the numbers of tokens differ: images of at most
1,003,520 pixels (vLLM's limit here), video frames of at least 100,352 pixels (qwen-vl-utils' limit,
which Octavo applies and vLLM does not), side lengths in multiples of 28.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from octavo.engine.config.hub import resolve_model

from .. import process_memory
from ..options import JsonFile, WorkloadOptions, at_least_one, with_options
from ..request_file import to_line
from ..workload import BenchRequest
from . import engines
from .engines import RequestTimes
from .report import Comparison, Round

PROGRAM = Path(engines.__file__)
WARM_UP = 1_000_000  # seed offset, so that the warm-up request occurs in no round


class NotThere(Exception):
    """The engine is not installed or did not start; the text says why."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine and its settings, as in "octavo:quantization=int8,max_num_seqs=32"."""

    label: str
    name: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> EngineSpec:
        """Parse a command-line argument. Raises ValueError if it is malformed."""
        name, _, rest = text.partition(":")
        if name not in engines.ENGINES:
            raise ValueError(f"{text}: unknown engine; choose from {', '.join(engines.ENGINES)}")
        settings: dict[str, Any] = {}
        for setting in filter(None, rest.split(",")):
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"{text}: {setting} must have the form name=value")
            settings[key] = _value(value)
        return cls(text, name, settings)


def _value(text: str) -> Any:
    """Parse a number, true, false or null as JSON; return other text unchanged."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


class EngineProcess:
    """An engine in its own process. Raises `NotThere` if it does not start."""

    def __init__(self, spec: EngineSpec, python: str, model: Path) -> None:
        self.spec = spec
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        began = time.perf_counter()
        settings = json.dumps({"model": str(model), **spec.settings})
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(PROGRAM), spec.name, settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            raise NotThere(f"{python}: {error.strerror}") from None
        with process_memory.watch(self.pid) as peak:
            self.version = str(self._answer()["ready"])
        self.start_seconds = time.perf_counter() - began
        self.start_bytes = peak.anonymous

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, requests: Sequence[BenchRequest]) -> Round:
        """Run the requests. Raises ValueError with the engine's error if it fails."""
        lines = "".join(f"{to_line(request)}\n" for request in requests)
        self._send(lines)
        with process_memory.watch(self.pid) as peak:
            self._send("\n")
            answer = self._answer()
        if "error" in answer:
            raise ValueError(answer["error"])
        process_memory.wait_quiet(self.pid)
        memory = peak.anonymous + process_memory.shared_bytes(self.pid)
        return Round.of([RequestTimes(**times) for times in answer["times"]], memory)

    def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` reports why the process exited
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        last = [text for text in self._log.read().splitlines() if text.strip()][-1:]
        raise NotThere(last[0] if last else f"exited with status {self._process.returncode}")

    def close(self) -> None:
        """Close the engine's stdin and wait for it to exit; kill it after a timeout."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def compare(
    specs: Sequence[EngineSpec],
    pythons: dict[str, str],
    model_dir: Path,
    options: WorkloadOptions,
    num_prompts: int,
    rounds: int,
    console: Console,
) -> Comparison:
    """Load the engines one after another, then run them in alternation."""
    found = Comparison()
    warm_up = [replace(options.make(model_dir, 1, WARM_UP)[0], max_tokens=2, after=None)]
    with contextlib.ExitStack() as stack:
        there: list[EngineProcess] = []
        for spec in specs:
            try:
                console.print(f"starting {spec.label}", style="dim")
                engine = EngineProcess(spec, pythons.get(spec.name, sys.executable), model_dir)
                stack.callback(engine.close)
                engine.run(warm_up)
            except (NotThere, ValueError) as error:
                found.skipped[spec.label] = str(error)
                console.print(f"{spec.label} skipped: {error}", style="yellow", markup=False)
                continue
            console.print(f"{spec.label} ready after {engine.start_seconds:.1f} s", style="dim")
            there.append(engine)
            found.add_engine(spec.label, engine.version, engine.start_seconds)
        for number in range(rounds):
            requests = options.make(model_dir, num_prompts, number)
            for engine in tuple(there):
                title = f"round {number + 1} of {rounds}: {engine.spec.label}"
                try:
                    result = _run(engine, there, requests, found)
                    console.print(f"{title}: {result.as_text()}", style="dim", markup=False)
                except (NotThere, ValueError) as error:
                    found.skipped[engine.spec.label] = f"in round {number + 1}: {error}"
                    there.remove(engine)
    return found


def _run(
    engine: EngineProcess,
    there: Sequence[EngineProcess],
    requests: Sequence[BenchRequest],
    found: Comparison,
) -> Round:
    """Run one engine's part of a round; record the CPU use of the idle engines."""
    others = [each.pid for each in there if each is not engine]
    before = sum(map(process_memory.cpu_seconds, others))
    result = engine.run(requests)
    busy = sum(map(process_memory.cpu_seconds, others)) - before
    found.add_round(engine.spec.label, result, busy / result.seconds)
    return result


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
@with_options
def main(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="ENGINE...",
            help="octavo, transformers or vllm, optionally with settings: "
            "octavo:quantization=int8. Ratios are relative to the last one.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")],
    workload: WorkloadOptions,
    json_file: JsonFile = None,
    num_prompts: Annotated[int, typer.Option(help="Requests, all submitted at the start.")] = 16,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 3,
    vllm_python: Annotated[
        str, typer.Option(help="Python executable of vLLM's environment.")
    ] = "/tmp/vllm/bin/python",
) -> None:
    """Compare engines on one workload, run in alternation."""
    console = Console(stderr=True)
    try:
        specs = [EngineSpec.parse(name) for name in names]
        at_least_one(rounds, "rounds")
        found = compare(
            specs,
            {"vllm": vllm_python},
            resolve_model(model, "huggingface"),
            workload,
            num_prompts,
            rounds,
            console,
        )
        to_stdout = str(json_file) == "-"
        found.write(console if to_stdout else Console(), json_file)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
