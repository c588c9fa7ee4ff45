"""Fuzz structured output: compile random grammars and generate random outputs.

    python -m octavo.benchmarks.fuzz.grammar --count 50000

Each random grammar is compiled as in the engine, on a thread with a 2 MB stack, and random outputs
are generated from it token by token. Reports crashes (the run ends), outliers in CPU time and
memory, and complete outputs that violate their JSON schema (checked with jsonschema).
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ...engine.config.engine_config import EMBEDDED_MODEL
from ...engine.errors import InputError
from ...engine.structured_output import compiler
from ...engine.structured_output.compiler import Grammar, Grammars
from ...engine.structured_output.library import heap_bytes
from ...engine.structured_output.matchers import MAX_MATCHER_SECONDS
from ...engine.structured_output.trials import MAX_GRAMMAR_BYTES
from .grammar_cases import Case, random_case

STACK_BYTES = 2 << 20
MAX_COMPILE_SECONDS = 2.0  # CPU time in the engine; trial compilation is limited to one second
MAX_STEP_SECONDS = 0.5  # CPU time to compute the mask of one token and to consume it
MAX_GROWTH = 64 << 20  # bytes, while one output is generated
NUM_TOP = 5  # worst cases listed in the report


@dataclass
class Report:
    """Results of a run."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_checked: int = 0  # complete outputs validated with jsonschema
    failures: list[str] = field(default_factory=list)
    _top: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def measure(self, name: str, value: float, seed: int, most: float) -> None:
        heapq.heappush(top := self._top.setdefault(name, []), (value, seed))
        if len(top) > NUM_TOP:
            heapq.heappop(top)
        if value > most:
            self.failures.append(f"seed {seed}: {name} {value:.3g} exceeds {most:.3g}")

    def lines(self) -> Iterator[str]:
        yield ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        yield f"{self.num_checked} complete outputs validated with jsonschema"
        for name, top in self._top.items():
            worst = ", ".join(f"{value:.3g} (seed {seed})" for value, seed in sorted(top)[::-1])
            yield f"worst {name}: {worst}"
        yield f"{len(self.failures)} failures"
        yield from self.failures[:50]


class Fuzzer:
    def __init__(self, tokenizer: Tokenizer, end_token_id: int, max_tokens: int = 120) -> None:
        size = tokenizer.get_vocab_size()
        self._grammars = Grammars(tokenizer, size, frozenset({end_token_id}))
        self._end, self._max_tokens = end_token_id, max_tokens
        self._tokenizer = tokenizer
        ids = {tokenizer.token_to_id(text) for text in ('"', "}", "]", '"}', "1")}
        self._closing = np.array(sorted(token for token in ids if token is not None))
        self.report = Report()

    def run(self, seeds: Sequence[int], is_verbose: bool = False) -> None:
        """Run the seeds on a thread with a small stack."""
        before = compiler.STACK_BYTES, threading.stack_size(STACK_BYTES)
        compiler.STACK_BYTES = STACK_BYTES
        try:
            thread = threading.Thread(target=self._run, args=(seeds, is_verbose))
            thread.start()
            thread.join()
        finally:
            compiler.STACK_BYTES = before[0]
            threading.stack_size(before[1])

    def close(self) -> None:
        self._grammars.close()

    def _run(self, seeds: Sequence[int], is_verbose: bool) -> None:
        self._grammars.warm()
        start = time.monotonic()
        for count, seed in enumerate(seeds, 1):
            try:
                self._try(seed)
            except Exception as error:
                self.report.failures.append(f"seed {seed}: {type(error).__name__}: {error}"[:300])
            if is_verbose and count % 100 == 0:
                left = (len(seeds) - count) * (time.monotonic() - start) / count
                failed = len(self.report.failures)
                text = f"{count}/{len(seeds)}, {failed} failures, {left / 60:.0f} min left"
                print("\n".join([text, *self.report.failures[-3:]]), file=sys.stderr, flush=True)

    def _try(self, seed: int) -> None:
        case = random_case(seed)
        if case is None:
            self.report.outcomes["no structured output"] += 1
            return
        heap, start = heap_bytes(), time.process_time()
        try:
            grammar = self._grammars.compile(case.spec)
        except InputError:
            self.report.outcomes[f"{case.kind} rejected"] += 1
            grammar = None
        seconds = time.process_time() - start
        self.report.measure("compile seconds", seconds, seed, MAX_COMPILE_SECONDS)
        if grammar is None:
            return
        self.report.outcomes[f"{case.kind} compiled"] += 1
        kept = float(heap_bytes() - heap)
        self.report.measure("grammar bytes", kept, seed, 1.5 * MAX_GRAMMAR_BYTES)
        for index in range(2):
            self._write(case, grammar, seed, Random(seed + index))
        self.report.measure("bytes grown", heap_bytes() - heap - kept, seed, MAX_GROWTH)
        self._grammars.forget(grammar)

    def _write(self, case: Case, grammar: Grammar, seed: int, rng: Random) -> None:
        """Generate one random output; validate it against its schema once it is complete."""
        state = grammar.template.deep_copy()
        rows = self._grammars.new_rows(1)
        answer: list[int] = []
        worst, is_complete = 0.0, False
        while len(answer) < self._max_tokens and not is_complete:
            start = time.thread_time()
            state.unsafe_compute_mask_ptr(rows.ctypes.data, rows.nbytes)
            if state.is_error():
                break
            token = self._draw(rows[0], rng)
            if token == self._end:
                is_complete = True
                break
            answer.append(token)
            state.consume_tokens([token])
            worst = max(worst, time.thread_time() - start)
            if worst > MAX_MATCHER_SECONDS:  # the engine fails the request
                self.report.outcomes["step too slow"] += 1
                break
            is_complete = bool(state.is_stopped()) and not state.is_error()
        self.report.measure("step seconds", worst, seed, MAX_STEP_SECONDS)
        if is_complete and case.schema is not None:
            text = self._tokenizer.decode(answer, skip_special_tokens=False)
            self._check(case.schema, text, seed)

    def _draw(self, row: Any, rng: Random) -> int:
        """Sample a token, preferring tokens that close something so that outputs terminate."""
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        closing = np.intersect1d(allowed, np.append(self._closing, self._end))
        return int(rng.choice(closing if len(closing) and rng.random() < 0.35 else allowed))

    def _check(self, schema: dict[str, Any], text: str, seed: int) -> None:
        import jsonschema  # type: ignore[import-untyped]

        kind = jsonschema.Draft202012Validator
        self.report.num_checked += 1
        try:
            value = json.loads(text)
            kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
        except RecursionError:  # jsonschema follows circular references without end
            self.report.num_checked -= 1
        except (ValueError, jsonschema.ValidationError) as error:
            reason = str(error).partition("\n")[0][:160]
            self.report.failures.append(f"seed {seed}: {text[:200]!r}: {reason}")


def load_tokenizer(path: Path | None) -> tuple[Tokenizer, int]:
    tokenizer = Tokenizer.from_file(str(path or EMBEDDED_MODEL / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    if end is None:
        raise SystemExit(f"{path}: no <|im_end|> token in the vocabulary")
    return tokenizer, end


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; default: embedded model")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    fuzzer = Fuzzer(*load_tokenizer(given.tokenizer))
    fuzzer.run(range(given.first, given.first + given.count), is_verbose=True)
    fuzzer.close()
    print("\n".join(fuzzer.report.lines()))
    return 1 if fuzzer.report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
