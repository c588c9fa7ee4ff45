"""Structured output that would crash, stall or fill the engine, and the process that tries it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import octavo
from octavo import SamplingParams, StructuredOutput
from octavo.benchmarks.fuzz.grammar import Fuzzer, load_tokenizer
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.errors import GrammarQueueFull, InputError
from octavo.engine.input import preprocess_pool
from octavo.engine.input.preprocess_pool import InputPool
from octavo.engine.structured_output import compiler, matchers, trials
from octavo.engine.structured_output.compiler import Grammar, Grammars
from octavo.engine.structured_output.library import heap_bytes
from octavo.engine.structured_output.matchers import Matcher, Matchers
from octavo.engine.structured_output.trials import CompileCancelled, CompileTask
from octavo.engine.tool_calling.tool_choice import ToolUse
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.step import RequestUpdate

SMALL = StructuredOutput(regex="[ab]{3}")


def chain(length: int) -> dict[str, Any]:
    defs = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(length)}
    return {"$defs": defs | {str(length): {"type": "null"}}, "$ref": "#/$defs/0"}


def lark_chain(name: str, length: int) -> str:
    links = "".join(f"{name}{i}: {name}{i + 1}\n" for i in range(length))
    return f'start: {name}0\n{links}{name}{length}: "a"\n'


def nested(kind: str, length: int) -> dict[str, Any]:
    names = {str(i): {kind: [{"$ref": f"#/$defs/{i + 1}"}]} for i in range(length)}
    return {"$defs": names | {str(length): {"type": "null"}}, "$ref": "#/$defs/0"}


TOOL = {"type": "object", "properties": {"a": {"$ref": "#/$defs/0"}}, "$defs": chain(1300)["$defs"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": TOOL}}]
STACK: dict[str, StructuredOutput] = {
    "schema": StructuredOutput(json_schema=chain(1300)),
    "any_of": StructuredOutput(json_schema=nested("anyOf", 1300)),
    "all_of": StructuredOutput(json_schema=nested("allOf", 1300)),
    "rules": StructuredOutput(lark=lark_chain("r", 3500)),
    "terminals": StructuredOutput(lark=lark_chain("R", 3000)),
    "tools": StructuredOutput(lark=ToolUse(TOOLS, "required").grammar()),
}
PATTERN = "a?" * 10000
COSTLY: dict[str, StructuredOutput] = {
    "multiple": StructuredOutput(json_schema={"type": "integer", "multipleOf": 99991}),
    "multiples": StructuredOutput(
        json_schema={"allOf": [{"multipleOf": 9973}, {"multipleOf": 97}]}
    ),
    "stars": StructuredOutput(regex=".*" * 5000),
    "optional": StructuredOutput(regex="a?" * 20000),
    "pattern": StructuredOutput(json_schema={"type": "string", "pattern": f"^{PATTERN}$"}),
    "repeated": StructuredOutput(regex="(a{1000}){1000}"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    ends = frozenset({tokenizer.token_to_id("<|im_end|>")})
    made = Grammars(tokenizer, tokenizer.get_vocab_size(), ends)
    yield made
    made.close()


@pytest.fixture
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "SLOW_SECONDS", 0.25)
    monkeypatch.setattr(trials, "WALL_FACTOR", 1000)


@pytest.mark.lesson("L34")
@pytest.mark.parametrize("name", sorted(STACK))
def test_chains_of_references_end_a_worker_and_not_the_engine(
    grammars: Grammars, short_trials: None, name: str
) -> None:
    with pytest.raises(InputError, match="too complex"):
        grammars.compile(STACK[name])
    assert grammars.compile(SMALL).num_bytes > 0


@pytest.mark.lesson("L35")
@pytest.mark.parametrize("name", sorted(COSTLY))
def test_costly_grammars_are_rejected(grammars: Grammars, short_trials: None, name: str) -> None:
    """Without keeping memory in the engine."""
    grammars.compile(SMALL)
    before = heap_bytes()
    with pytest.raises(InputError, match=r"too complex|too large"):
        grammars.compile(COSTLY[name])
    assert heap_bytes() - before < 8 << 20


@pytest.mark.lesson("L35")
def test_a_cancelled_trial_ends(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it could go on for ever."""
    monkeypatch.setattr(trials, "QUICK_SECONDS", 10_000.0)
    task, errors = CompileTask(), []
    form = StructuredOutput(regex="c?" * 20000)

    def run() -> None:
        try:
            grammars.compile(form, task)
        except CompileCancelled as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while task._worker is None:
        time.sleep(0.001)
    task.cancel()
    thread.join(60)
    assert not thread.is_alive() and len(errors) == 1
    task.cancel()  # after its end it interrupts no other
    assert grammars.compile(StructuredOutput(regex="after")).seconds >= 0
    with pytest.raises(CompileCancelled):
        grammars.compile(StructuredOutput(regex="never tried"), task)


@pytest.mark.lesson("L35")
def test_rejections_are_remembered(
    grammars: Grammars, short_trials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = StructuredOutput(regex="b?" * 10000)
    with pytest.raises(InputError):
        grammars.compile(form)
    monkeypatch.setattr(trials.Trials, "run", None)  # it is not called
    with pytest.raises(InputError, match="too complex"):
        grammars.compile(form)


@pytest.mark.lesson("L35")
def test_memory_of_grammars_is_bounded_as_measured(
    tokenizer: Tokenizer, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = grammars.compile(StructuredOutput(json_schema={"enum": ["x" * 3000]}))
    monkeypatch.setattr(compiler, "MAX_CACHED_BYTES", first.num_bytes)
    other = grammars.compile(StructuredOutput(json_schema={"enum": ["y" * 3000]}))
    assert first.form not in grammars._found and other.form in grammars._found
    monkeypatch.setattr(compiler, "MAX_LIVE_BYTES", first.num_bytes)  # in use
    with pytest.raises(GrammarQueueFull, match="try again later"):
        grammars.compile(StructuredOutput(json_schema={"enum": ["z" * 3000]}))
    assert not grammars._found


@pytest.mark.lesson("L35")
def test_memory_that_answers_add_to_cached_grammars_is_bounded(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each email pattern grows by over a megabyte; the cache counts that and drops them."""
    monkeypatch.setattr(compiler, "MAX_CACHED_BYTES", 8 << 20)
    states, rng = Matchers(), Random(0)
    schemas = [{"type": "string", "format": "email", "title": str(index)} for index in range(16)]
    before = 0
    for schema in schemas:
        grammar = grammars.compile(StructuredOutput(json_schema=schema))
        write_randomly(states, grammar, rng)
        before = before or heap_bytes()
    del grammar
    gc.collect()
    assert heap_bytes() - before < 12 << 20
    assert 1 <= sum(form.json_schema is not None for form in grammars._found) <= 3


def write_randomly(states: Matchers, grammar: Grammar, rng: Random) -> None:
    """Generate three answers of up to 100 tokens."""
    scheduler: Any = SimpleNamespace(finish=lambda *_: None)
    for _ in range(3):
        request = Request("r", array("i", [1]), SamplingParams(structured=grammar.form))
        states.add([request], grammar)
        update = RequestUpdate("r", [0], RequestStatus.RUNNING)
        while len(request.output_token_ids) < 100 and update.status is RequestStatus.RUNNING:
            row = states._matchers["r"].allowed.view(np.uint8)
            token = rng.choice(np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist())
            request.token_ids.append(token)
            (update,) = states.read([update._replace(new_token_ids=[token])], scheduler)
        states.remove("r")


def test_the_process_is_started_again_and_ends_with_the_engine(tokenizer: Tokenizer) -> None:
    ends = frozenset({tokenizer.token_to_id("<|im_end|>")})
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), ends)
    grammars.compile(SMALL)
    tried = grammars._trials
    assert tried is not None and tried.pid is not None
    first = tried.pid
    os.kill(first, signal.SIGKILL)
    tried._slots[True].worker.interrupt()  # type: ignore[union-attr]
    for letters in ("cd", "ef"):
        grammars.compile(StructuredOutput(regex=letters))
    second = tried.pid
    assert second != first
    grammars.close()
    grammars.close()
    assert not os.path.exists(f"/proc/{second}")


def test_bytes_that_are_forced_without_end_do_not_stop_a_step(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """A lexeme that takes all that follows leaves a single byte allowed, for ever."""
    grammar = grammars.compile(StructuredOutput(lark='start: A "a"\nA: /a+/'))
    state, rows = grammar.template.deep_copy(), grammars.new_rows(1)
    for _ in range(5):
        assert state.consume_tokens([tokenizer.token_to_id("a")])
        state.unsafe_compute_mask_ptr(rows.ctypes.data, rows.nbytes)
    with pytest.raises(InputError, match=r"x-guidance.key_separator: 'a': must be ':'"):
        options = {"x-guidance": {"key_separator": "a"}}
        grammars.compile(StructuredOutput(json_schema=options))


class FakeGrammars:
    """Every grammar is a slow one, and waits for `may_end`."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def compile_quickly(self, form: StructuredOutput, task: CompileTask) -> Any:
        return "quick" if form.regex == "quick" else None

    def compile_slowly(self, form: StructuredOutput, task: CompileTask) -> Any:
        assert self.may_end.wait(60)
        return "slow"


@pytest.mark.lesson("L35")
def test_slow_grammars_delay_each_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_pool, "MAX_SLOW_GRAMMARS", 3)
    monkeypatch.setattr(preprocess_pool.InputJob, "_begin", lambda job, *_: job._grammar)
    processor: Any = SimpleNamespace(limits=None)
    grammars: Any = FakeGrammars()
    monkeypatch.setattr(preprocess_pool, "MediaTask", lambda limits: None)
    monkeypatch.setattr(preprocess_pool, "replace", lambda made, **_: made)
    pool = InputPool(processor, grammars=grammars)
    try:
        slow = [pool.submit("", structured(str(index))) for index in range(3)]
        while len(pool._slow_jobs) < 3:
            time.sleep(0.001)
        with pytest.raises(GrammarQueueFull, match="try again later"):
            pool.submit("", structured("4")).future.result(60)
        quick = pool.submit("", structured("quick"))
        assert wait_started(quick)
        slow[1].cancel()
        assert len(pool._slow_jobs) == 2
        grammars.may_end.set()
        assert wait_started(slow[0]) and wait_started(slow[2])
        assert not pool._slow_jobs
    finally:
        grammars.may_end.set()
        pool.close()


def structured(regex: str) -> SamplingParams:
    return SamplingParams(structured=StructuredOutput(regex=regex))


def wait_started(job: Any) -> bool:
    """Whether the job got past its grammar: its result here fails for want of a real input."""
    try:
        job.future.result(60)
    except AttributeError:
        return job._grammar is not None
    return True


def test_random_grammars_are_bounded_and_answers_satisfy_their_schemas() -> None:
    fuzzer = Fuzzer(*load_tokenizer(None), max_tokens=60)
    fuzzer.run(range(60, 160))
    fuzzer.close()
    report = fuzzer.report
    assert not report.failures, "\n".join(report.lines())
    assert report.num_checked > 20 and sum(report.outcomes.values()) == 100


@pytest.mark.lesson("L34")
@pytest.mark.slow
@pytest.mark.timeout(8 * 3600)
def test_50000_random_grammars_are_bounded() -> None:
    fuzzer = Fuzzer(*load_tokenizer(None))
    fuzzer.run(range(50_000), is_verbose=True)
    fuzzer.close()
    assert not fuzzer.report.failures, "\n".join(fuzzer.report.lines())


def test_matchers_take_what_a_trial_passed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    deep = grammars.compile(StructuredOutput(json_schema=chain(40)))
    request = Request("r", array("i", [1]), SamplingParams(structured=deep.form))
    request.token_ids.extend(tokenizer.encode("[[[]]]", add_special_tokens=False).ids)
    matcher = Matcher(deep, request)
    matcher.read()
    assert matcher.is_done and not matcher.error


class Timed:
    """As much of a `Matcher` as `_fail_slow` uses."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.has_failed = seconds, False
        self.grammar = SimpleNamespace(owner=SimpleNamespace(forget=lambda grammar: None))

    def fail(self) -> None:
        self.has_failed = True


@pytest.mark.lesson("L35")
@pytest.mark.parametrize(
    ("seconds", "failed"),
    [
        ([0.0, 0.05, 0.1], []),
        ([0.2, 0.05, 0.11], [0, 2]),
        ([0.09] * 10 + [0.08] * 5, [0, 1, 2, 3]),  # together at most MAX_STEP_SECONDS
    ],
)
def test_requests_whose_masks_take_too_long_fail(seconds: list[float], failed: list[int]) -> None:
    timed: list[Any] = [Timed(each) for each in seconds]
    matchers._fail_slow(timed)
    assert [index for index, each in enumerate(timed) if each.has_failed] == failed


@pytest.mark.lesson("L35")
def test_a_slow_mask_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with octavo.LLM(max_model_len=128) as llm:
        monkeypatch.setattr(matchers, "MAX_MATCHER_SECONDS", -1.0)
        plain, guided = SamplingParams(max_tokens=4), structured("[a-z]+")
        assert llm.generate("hi", plain)[0].outputs[0].token_ids
        error = llm.generate("hi", guided)[0].error
        assert "structured.regex: after 1 tokens it is too complex" in error
        assert llm.generate("hi", plain)[0].outputs[0].token_ids


def test_an_error_names_the_count_that_is_too_large(grammars: Grammars, short_trials: None) -> None:
    schema = {"pattern": "(a|b.*c)+d", "minLength": 50_000, "maxLength": 1_000_000}
    with pytest.raises(InputError, match=r"too complex.*; maxLength: 1000000 may be the cause"):
        grammars.compile(StructuredOutput(json_schema=schema))


@pytest.mark.lesson("L35")
def test_timeout_ends_requests_whose_grammar_compiles_or_is_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second request waits for the first one's trial, which could go on for hours."""

    async def end_of(engine: octavo.AsyncLLM, params: SamplingParams, timeout_s: float) -> str:
        deltas = engine.generate("hi", params, timeout_s=timeout_s)
        return next(iter([delta.error async for delta in deltas if delta.error]), "")

    async def run() -> None:
        async with octavo.AsyncLLM(max_model_len=128) as engine:
            assert not await end_of(engine, replace(structured("a"), max_tokens=4), 60)
            monkeypatch.setattr(trials, "QUICK_SECONDS", 10_000.0)
            started = time.monotonic()
            slow = [end_of(engine, structured(f"{letter}?" * 20_000), 0.5) for letter in "de"]
            errors = await asyncio.gather(*slow)
            assert all(error.startswith("DEADLINE_EXCEEDED") for error in errors), errors
            assert time.monotonic() - started < 5
            assert not await end_of(engine, replace(structured("b"), max_tokens=4), 60)

    asyncio.run(run())
