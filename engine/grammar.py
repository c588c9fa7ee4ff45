"""Forms of answers read by llguidance: what may come next, as bits over the vocabulary.

A `Grammar` is a form that was compiled, a `Matcher` one answer's place in it. All work in a step is
bounded by limits, not by a clock, so that what is refused does not depend on what else runs.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..scheduler.request import Request
from ..scheduler.structured import StructuredOutput
from .grammar_error import TOO_COMPLEX, reason_of
from .grammar_joins import too_joined
from .input_error import InputError

log = logging.getLogger("octavo.engine")

Int32 = npt.NDArray[np.int32]

CACHED = 64  # grammars
CACHED_TEXT = 1 << 19  # characters of them together: compiled, one takes some 250 times as much
RENEWABLE = 0.02  # seconds: one that took longer to compile is not compiled again within a step
MAX_ANSWERS = 256  # of one grammar: what their lexer has found on the way adds up
MAX_RENEWED = 8  # answers of one grammar that are read anew: that is work within a step
WORD = 32  # bits

# Of llguidance, a tenth to a half of its defaults. At these the worst of a dozen hostile forms took
# 0.2 seconds to compile, and 12 ms of a step.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 30_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# White space is bounded, or a small model writes nothing else; keywords are kept to, or refused.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"( |\n {0,20})?", "lenient": False}


class Grammars:
    """Compiles forms for one tokenizer. Thread-safe; the latest are kept."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_token_ids: frozenset[int],
        banned_token_ids: Sequence[int] = (),
    ) -> None:
        """`vocab_size`: the model's, padding included. `banned_token_ids`: never drawn."""
        self._backend, self.vocab_size = tokenizer, vocab_size
        self.end_token_ids = sorted(token for token in end_token_ids if token < vocab_size)
        self._banned = [token for token in banned_token_ids if token < vocab_size]
        self._tokenizer: Any = None  # made when first used: that takes a second
        self._found: OrderedDict[StructuredOutput, Grammar] = OrderedDict()
        self._lock, self._building = threading.Lock(), threading.Lock()

    def compile(self, form: StructuredOutput) -> Grammar:
        """Milliseconds for most, and about a second at most. Raises `InputError`."""
        with self._lock:
            found = self._found.get(form)
            if found is not None and found.num_answers < MAX_ANSWERS:
                self._found.move_to_end(form)
                return found
        grammar = self._compile(form)
        with self._lock:
            self._found[form] = grammar
            size = sum(len(each.text) for each in self._found.values())
            while len(self._found) > CACHED or (size > CACHED_TEXT and len(self._found) > 1):
                size -= len(self._found.popitem(last=False)[1].text)
        return grammar

    def forget(self, grammar: Grammar) -> None:
        """What it shares among its answers is used up: the next one starts anew."""
        with self._lock:
            if self._found.get(grammar.form) is grammar:
                del self._found[grammar.form]

    def warm(self) -> None:
        """Makes ready what all grammars need."""
        with self._building:
            if not self.end_token_ids:
                log.warning("the checkpoint has no end token: answers cannot be given a form")
            elif self._tokenizer is None:
                import llguidance

                backend = Tokenizer.from_str(self._backend.to_str())
                backend.no_padding()
                backend.no_truncation()
                size = max(self.vocab_size, backend.get_vocab_size())
                try:
                    made = llguidance.LLTokenizer(backend.to_str(), size, self.end_token_ids)
                except ValueError:  # such as a tokenizer of a kind that it does not know
                    log.exception("answers cannot be given a form with this tokenizer")
                    self.end_token_ids = []
                else:
                    self._tokenizer = made

    def _compile(self, form: StructuredOutput) -> Grammar:
        self.warm()
        if self._tokenizer is None:
            text = "not with this checkpoint's tokenizer and end tokens; see the log"
            raise InputError("structured", text)
        if reason := too_joined(form):
            raise InputError(f"structured.{form.field}", reason)
        begun = time.perf_counter()
        try:
            text = grammar_text(form)
            matcher = self.new_matcher(text)
        except Exception as error:  # what the library says of what it cannot even read
            raise _refused(form, str(error)) from None
        if matcher.is_error():
            raise _refused(form, matcher.get_error())
        row = self.new_rows(1)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error():
            raise _refused(form, matcher.get_error())
        first = self.cut(row[0])
        if not first.any():
            raise _refused(form, "NoExtension")
        return Grammar(self, form, text, matcher, first, time.perf_counter() - begun)

    def new_matcher(self, text: str) -> Any:
        import llguidance

        limits = llguidance.LLParserLimits(**LIMITS)
        return llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)

    def new_rows(self, count: int) -> Int32:
        """Room for masks [count, words] of the library's vocabulary."""
        return np.zeros((count, -(-self._tokenizer.vocab_size // WORD)), np.int32)

    def cut(self, row: Int32) -> Int32:
        """The library's mask as wide as the model's vocabulary, without what is never drawn."""
        row = row[: -(-self.vocab_size // WORD)]
        if self.vocab_size % WORD:
            row[-1] &= np.int32((1 << self.vocab_size % WORD) - 1)
        clear(row, self._banned)
        return row


def grammar_text(form: StructuredOutput) -> str:
    """A form as llguidance takes it."""
    from llguidance import LLMatcher

    if form.json_schema is not None:
        schema = str(form.json_schema)
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.lark is not None:
        return LLMatcher.grammar_from_lark(form.lark)
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, form.choice)))


def _refused(form: StructuredOutput, text: str) -> InputError:
    name = form.field
    return InputError(f"structured.{name}", reason_of(text, name))


def clear(row: Int32, token_ids: Sequence[int]) -> None:
    for token in token_ids:
        row[token // WORD] &= np.int32(~np.uint32(1 << token % WORD).astype(np.int32))


@dataclass(eq=False)
class Grammar:
    """A form, compiled. Its answers share what its lexer finds on the way."""

    owner: Grammars
    form: StructuredOutput
    text: str
    template: Any  # an LLMatcher that has read nothing
    first: Int32  # [words] what an answer may begin with
    seconds: float  # that compiling took
    num_answers: int = 0
    num_renewed: int = 0


@dataclass(eq=False)
class Matcher:
    """One answer's place in its grammar: after all tokens that it has read."""

    grammar: Grammar
    request: Request
    allowed: Int32 = field(init=False)  # [words] what may come next
    is_done: bool = False  # nothing can follow
    error: str = ""  # why it cannot go on
    num_read: int = 0  # tokens of the output

    def __post_init__(self) -> None:
        self.grammar.num_answers += 1
        self._state = self.grammar.template.deep_copy()
        self._is_own = False  # its lexer is shared with no other answer
        self.allow(self.grammar.first.copy())

    @property
    def state(self) -> Any:
        return self._state

    def allow(self, row: Int32) -> None:
        """`row`: what its grammar allows. End tokens are held back where they are not to end the
        output, as long as anything else is left."""
        params = self.request.params
        held = list(self.grammar.owner.end_token_ids) if params.ignore_eos else []
        if self.num_read < params.min_tokens:
            size = self.grammar.owner.vocab_size
            held += [token for token in self.request.stop_token_ids if token < size]
        self.allowed = row
        if held:
            rest = row.copy()
            clear(rest, held)
            self.allowed = rest if rest.any() else row

    def read(self) -> None:
        """Takes in what the output has more by now."""
        token_ids = self.request.output_token_ids[self.num_read :]
        self.num_read += len(token_ids)
        is_read = self._state.consume_tokens(list(token_ids))
        if (self._state.is_error() or not is_read) and not self.renew():
            return
        self.is_done = bool(self._state.is_stopped())

    def renew(self) -> bool:
        """After an error, which may be that what it shares with other answers is used up: reads
        all anew by itself. Whether that helps; else `error` is set."""
        grammar = self.grammar
        grammar.owner.forget(grammar)
        is_shared = not self._is_own and grammar.num_answers > 1
        if is_shared and grammar.seconds < RENEWABLE and grammar.num_renewed < MAX_RENEWED:
            self._is_own = True
            grammar.num_renewed += 1
            self._state = grammar.owner.new_matcher(grammar.text)
            output = list(self.request.output_token_ids[: self.num_read])
            if self._state.consume_tokens(output) and not self._state.is_error():
                return True
        name = f"structured.{grammar.form.field}"
        self.error = f"INVALID_ARGUMENT: {name}: after {self.num_read} tokens it {TOO_COMPLEX}"
        return False
