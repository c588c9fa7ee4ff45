"""Structured output with llguidance: compile grammars and compute token bitmasks.

A `Grammar` is compiled; a `Matcher` is the state of one answer in it. Every grammar is first
compiled in a trial process (`trials.py`) with limits on time, memory and stack. Work in a step is
bounded by llguidance's own limits, not by a clock, so that rejections do not depend on the load.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ...scheduler.structured import StructuredOutput
from ..errors import GrammarQueueFull, InputError
from .error_messages import reason_of, with_largest_count
from .grammar_text import grammar_text
from .library import LIMITS, WORD, load_tokenizer, mask_words, new_matcher
from .subschemas import UnsupportedSchema
from .trials import CompileTask, Outcome, Trials, TrialsUnavailable

__all__ = ["LIMITS", "Grammar", "GrammarQueueFull", "Grammars", "TrialsUnavailable"]

log = logging.getLogger("octavo.engine")

Int32 = npt.NDArray[np.int32]

MAX_CACHED = 64  # grammars
MAX_CACHED_BYTES = 64 << 20  # total size of cached grammars, with what their lexers grew
MAX_LIVE_BYTES = 512 << 20  # of all grammars that are cached or in use
MAX_OUTCOMES = 4096  # cached trial results
STACK_BYTES = 8 << 20  # stack for compiling, 16 times that of a trial
# A lexer grows with each mask, up to max_lexer_states. Measured with an email pattern: 37 KB per
# mask at first, 30 MB after 10,000 masks.
MASK_BYTES = 37_000
MAX_GROWTH = 32 << 20
MAX_ANSWERS = 256  # per compiled grammar, since the states of their shared lexer accumulate


class Grammars:
    """Compiler and cache of grammars for one tokenizer. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_token_ids: frozenset[int],
        banned_token_ids: Sequence[int] = (),
    ) -> None:
        """Create a compiler without loading the tokenizer.

        `vocab_size`: of the model, including padding. `banned_token_ids`: tokens never sampled.
        """
        self._backend, self.vocab_size = tokenizer, vocab_size
        self.end_token_ids = sorted(token for token in end_token_ids if token < vocab_size)
        self._banned = [token for token in banned_token_ids if token < vocab_size]
        self._tokenizer: Any = None  # loaded on first use, which takes a second
        self._trials: Trials | None = None
        self._found: OrderedDict[StructuredOutput, Grammar] = OrderedDict()
        self._outcomes: OrderedDict[bytes, Outcome] = OrderedDict()
        self._live: weakref.WeakSet[Grammar] = weakref.WeakSet()
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._is_closed = self._has_warned = False

    def compile(self, form: StructuredOutput, task: CompileTask | None = None) -> Grammar:
        """Return the compiled grammar. Takes milliseconds in most cases, seconds at most.

        Raises `InputError` for an unsupported grammar, `GrammarQueueFull` if too many are in use.
        """
        task = task or CompileTask()
        return self.compile_quickly(form, task) or self.compile_slowly(form, task)

    def compile_quickly(self, form: StructuredOutput, task: CompileTask) -> Grammar | None:
        """Return the grammar, or None if `compile_slowly` is needed. Raises as `compile`."""
        return self._cached(form) or self._compile(form, task, is_quick=True)

    def compile_slowly(self, form: StructuredOutput, task: CompileTask) -> Grammar:
        """Compile with the time limit for slow grammars. Raises as `compile`."""
        grammar = self._cached(form) or self._compile(form, task, is_quick=False)
        assert grammar is not None
        return grammar

    def _cached(self, form: StructuredOutput) -> Grammar | None:
        with self._lock:
            found = self._found.get(form)
            if found is None or found.num_answers >= MAX_ANSWERS:
                return None
            self._found.move_to_end(form)
            return found

    def forget(self, grammar: Grammar) -> None:
        """Remove a grammar whose shared lexer reached its limits from the cache."""
        with self._lock:
            if self._found.get(grammar.form) is grammar:
                del self._found[grammar.form]

    def warm(self) -> None:
        """Load the tokenizer here and, at the same time, in the trial process."""
        with self._building:
            if not self.end_token_ids:
                if self._has_warned:
                    return
                self._has_warned = True
                log.warning("structured output is disabled: the checkpoint defines no EOS token")
            elif self._tokenizer is None and not self._is_closed:
                backend = Tokenizer.from_str(self._backend.to_str())
                backend.no_padding()
                backend.no_truncation()
                size = max(self.vocab_size, backend.get_vocab_size())
                given = backend.to_str(), size, self.end_token_ids
                self._trials = self._trials or Trials(*given)
                try:
                    self._tokenizer = load_tokenizer(*given)
                except ValueError:  # unsupported kind of tokenizer
                    log.exception("structured output is disabled: unsupported tokenizer")
                    self.end_token_ids = []
                    self._has_warned = True
                    self._trials.close()

    def close(self) -> None:
        """Stop the trial process. Safe to call twice."""
        self._is_closed = True
        if self._trials is not None:
            self._trials.close()

    def _compile(self, form: StructuredOutput, task: CompileTask, is_quick: bool) -> Grammar | None:
        self.warm()
        if self._tokenizer is None or self._trials is None:
            text = "is not supported with this checkpoint's tokenizer and EOS tokens; see the log"
            raise InputError("structured", text)
        key = hashlib.sha256(repr(form).encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            outcome = self._outcomes.get(key)
        if outcome is not None and outcome.is_timed_out:
            if is_quick:
                return None
            outcome = None
        text = "" if outcome is not None and outcome.error else _text_of(form)
        if outcome is None:
            outcome = self._trials.run(text, form.field, is_quick, task)
            self._remember(key, outcome)
        if outcome.error:
            raise _rejected(form, outcome.error)
        if outcome.is_timed_out:
            return None
        self._make_room(outcome.num_bytes)
        task.check()
        return self._add(form, text, outcome)

    def _remember(self, key: bytes, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes[key] = outcome
            self._outcomes.move_to_end(key)
            while len(self._outcomes) > MAX_OUTCOMES:
                self._outcomes.popitem(last=False)

    def _make_room(self, num_bytes: int) -> None:
        """Evict cached grammars until a new one fits. Raises `GrammarQueueFull`."""
        while sum(each.num_bytes for each in tuple(self._live)) + num_bytes > MAX_LIVE_BYTES:
            with self._lock:
                if not self._found:
                    break
                self._found.popitem(last=False)
        else:
            return
        raise GrammarQueueFull(
            f"structured: the grammars in use exceed {MAX_LIVE_BYTES >> 20} MiB; try again later"
        )

    def _add(self, form: StructuredOutput, text: str, outcome: Outcome) -> Grammar:
        matcher, row = _in_large_stack(lambda: self._first_mask(form, text))
        first = self.cut(row)
        if not first.any():
            raise _rejected(form, reason_of("NoExtension", form.field))
        grammar = Grammar(self, form, text, matcher, first, outcome.seconds, outcome.num_bytes)
        self._live.add(grammar)
        with self._lock:
            self._found[form] = grammar
        self.trim()
        return grammar

    def trim(self) -> None:
        """Remove the least recently used grammars from the cache until it is within its limits."""
        with self._lock:
            size = sum(each.size for each in self._found.values())
            while len(self._found) > MAX_CACHED or (
                size > MAX_CACHED_BYTES and len(self._found) > 1
            ):
                size -= self._found.popitem(last=False)[1].size

    def _first_mask(self, form: StructuredOutput, text: str) -> tuple[Any, Int32]:
        """Compile a grammar that passed its trial, and compute its first mask."""
        matcher, row = self.new_matcher(text), self.new_rows(1)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error():
            raise _rejected(form, reason_of(matcher.get_error(), form.field))
        return matcher, row[0]

    def new_matcher(self, text: str) -> Any:
        return new_matcher(self._tokenizer, text)

    def new_rows(self, count: int) -> Int32:
        """Return zeroed masks [count, words] over llguidance's vocabulary."""
        return np.zeros((count, mask_words(self._tokenizer)), np.int32)

    def cut(self, row: Int32) -> Int32:
        """Truncate a mask to the model's vocabulary, and clear banned tokens."""
        row = row[: -(-self.vocab_size // WORD)]
        if self.vocab_size % WORD:
            row[-1] &= np.int32((1 << self.vocab_size % WORD) - 1)
        clear(row, self._banned)
        return row


def _text_of(form: StructuredOutput) -> str:
    try:
        return grammar_text(form)
    except UnsupportedSchema as error:
        raise _rejected(form, str(error)) from None
    except Exception as error:  # llguidance raises plain exceptions for unreadable grammars
        raise _rejected(form, reason_of(str(error), form.field)) from None


def _in_large_stack(call: Callable[[], tuple[Any, Int32]]) -> tuple[Any, Int32]:
    """Run a call on a thread with a stack larger than that of a trial."""
    made: list[tuple[Any, Int32]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            made.append(call())
        except BaseException as error:
            errors.append(error)

    with _STACK_LOCK:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return made[0]


_STACK_LOCK = threading.Lock()


def _rejected(form: StructuredOutput, reason: str) -> InputError:
    return InputError(f"structured.{form.field}", with_largest_count(form, reason))


def clear(row: Int32, token_ids: Sequence[int]) -> None:
    """Clear the bits of tokens in a mask."""
    for token in token_ids:
        row[token // WORD] &= np.int32(~np.uint32(1 << token % WORD).astype(np.int32))


@dataclass(eq=False)
class Grammar:
    """A compiled grammar. Its answers share one lexer and its states."""

    owner: Grammars
    form: StructuredOutput
    text: str
    template: Any  # an LLMatcher in its initial state
    first: Int32  # [words], mask of the first token
    seconds: float  # CPU time to compile it
    num_bytes: int  # memory of the compiled grammar, before its first answer
    num_answers: int = 0
    num_renewed: int = 0  # answers that were given a separate lexer
    num_masks: int = 0  # masks of all answers

    @property
    def size(self) -> int:
        """Upper estimate of the memory in bytes, with what the shared lexer grew."""
        return self.num_bytes + min(MAX_GROWTH, self.num_masks * MASK_BYTES)
