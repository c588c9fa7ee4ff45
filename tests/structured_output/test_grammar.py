"""Forms of answers: what is compiled and what is refused, masks over the vocabulary, and the real
model of a tiny checkpoint, alone, batched, in chunks, preempted, as a fork."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from octavo import StructuredOutput
from octavo.benchmarks.fakes.tiny_checkpoint import SPECIAL_IDS, write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_engine import TinyEngine
from octavo.benchmarks.fakes.tiny_requests import GREEDY, image, text, tiny_request
from octavo.engine.config.engine_config import EMBEDDED_MODEL, ModelConfig, PreprocessConfig
from octavo.engine.core.logit_edits import logit_edits
from octavo.engine.errors import InputError
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.batch import TokenMasks
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.sampler import FORBIDDEN, Sampler, SeenTokens
from octavo.engine.structured_output.compiler import LIMITS, Grammars
from octavo.engine.structured_output.matchers import Matcher
from octavo.engine.worker.wire import empty_sampling
from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.params import SamplingParams
from octavo.scheduler.request import Request

NUM_BLOCKS, BLOCK_SIZE, NEW_TOKENS = 96, 8, 40
PROMPT = [text(1, 21), *image(1, 84, 56), text(3, 8)]
ENDS = frozenset({SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]})
PADDED = 311  # ids: more than the tokenizer has, and no whole number of words

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "keyword": ({"json_schema": {"not": 0, "uniqueItems": True}}, "'not', 'uniqueItems': not"),
    "one_of": ({"json_schema": {"oneOf": [{}, {}]}}, "use anyOf"),
    "type": ({"json_schema": {"type": "strin"}}, "'strin' is not a JSON type"),
    "format": ({"json_schema": {"type": "string", "format": "hue"}}, "'hue' is not supported"),
    "contradiction": ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 1}}, "unsatis"),
    "no_values": ({"json_schema": {"enum": []}}, "is unsatisfiable"),
    "ref": ({"json_schema": {"$ref": "#/$defs/x"}}, "does not exist"),
    "far_ref": ({"json_schema": {"$ref": "http://10.0.0.1/x"}}, "only '#/...'"),
    "endless_ref": ({"json_schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
                    "matches nothing"),
    "pattern": ({"json_schema": {"type": "string", "pattern": "("}}, "invalid regular expr"),
    "nested": ({"json_schema": '{"items":' * 300 + "{}" + "}" * 300}, "nested too deep"),
    "product": ({"json_schema": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]}
                                           for i in range(30)]}}, "too complex"),
    "joined": ({"json_schema": {"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(15)]}},
               "15 pattern/format"),
    "group": ({"regex": "ab("}, "see character 3"),
    "words": ({"regex": "(too many"}, "is not a valid regular expr"),
    "word": ({"regex": "[exceeds"}, "is not a valid regular expr"),
    "start": ({"lark": 'foo: "a"'}, "has no rule named start"),
    "look": ({"regex": "a(?=b)"}, "look-around"),
    "back": ({"regex": r"(a)\1"}, "back-references"),
    "nothing": ({"regex": r"[^\s\S]"}, "matches nothing"),
    "exponential": ({"lark": "start: A\nA: /.*a.{30}/ & /.*b.{30}/ & /.*c.{30}/ & ~/.*d.{20}/"},
                    "too complex"),
    "name": ({"lark": "start: foo"}, "line 1, column 8: 'foo' is not defined"),
    "lark": ({"lark": 'start: "a"\nb ::= ['}, "line 2, column 4"),
    "loop": ({"lark": "start: a\na: b\nb: a"}, "matches nothing"),
    "banned": ({"lark": "start: <|image_pad|>"}, "matches nothing"),
}  # fmt: skip

MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({}, "structured: no field is set"),
    ({"choice": ()}, "structured: no field is set"),
    ({"regex": "a", "lark": "b"}, "structured: regex and lark are set"),
    ({"json_schema": '{"a":'}, "structured.json_schema: is not valid JSON at line 1, column 6"),
    ({"json_schema": "[]"}, "structured.json_schema=[]: must be a JSON object"),
    ({"json_schema": "[" * 60_000}, "structured.json_schema: is not valid JSON"),
    ({"json_schema": {"a": {1, 2}}}, "structured.json_schema: must be JSON-serializable"),
    ({"json_schema": '{"a":"' + "x" * 1_000_000 + '"}'}, "structured.json_schema: 1000008 char"),
    (
        {"regex": "a" * 1_000_000},
        "structured.regex: 1000000 characters; the maximum is 65536 bytes",
    ),
    ({"lark": ' {"grammars":[{"regex":"a"}]}'}, "structured.lark: starts with '{'"),
    (
        {"choice": ["\U0001f600" * 60 + str(i) for i in range(300)]},
        "structured.choice: exceeds 65536 bytes in total",
    ),
    ({"regex": 3}, "structured.regex=3: must be a string"),
    ({"regex": "\ud800"}, "structured.regex="),
    ({"choice": "yes"}, "structured.choice: must be a list"),
    ({"choice": ["a", ""]}, "structured.choice: must not be empty"),
    ({"choice": ["a"] * 2000}, "structured.choice: 2000 choices; the maximum is 1024"),
    ({"choice": ["a" * 60_000, "b" * 60_000]}, "structured.choice: exceeds 65536 bytes in total"),
]

CHOICES = (
    "red",
    "a red circle",
    "it's 👍",
    'say "no"\\n\n',
    "/[a-z]+/",
    "<|im_end|>",
    " x ",
    "é\t",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    ends = frozenset({tokenizer.token_to_id("<|im_end|>")})
    banned = [tokenizer.token_to_id("<|image_pad|>")]
    return Grammars(tokenizer, tokenizer.get_vocab_size() + 9, ends, banned)


def request_of(**params: Any) -> Request:
    given = {**vars(GREEDY), "structured": StructuredOutput(regex="a"), "max_tokens": 99, **params}
    return Request("r", tiny_request_ids(), SamplingParams(**given), stop_token_ids=ENDS)


def tiny_request_ids() -> Any:
    from array import array

    return array("i", [1, 2])


def bits(row: Any) -> list[int]:
    packed = np.ascontiguousarray(row).view(np.uint8)
    return np.flatnonzero(np.unpackbits(packed, bitorder="little")).tolist()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_bad_form_is_reported_in_our_words(grammars: Grammars, name: str) -> None:
    form, words = REFUSED[name]
    with pytest.raises(InputError) as caught:
        grammars.compile(StructuredOutput(**form))
    told = str(caught.value)
    assert words in told
    assert caught.value.field == f"structured.{next(iter(form))}" and len(told) < 300
    for theirs in ("fuel", "lexer", "limits.", "parse error", "NoExtension", "Unimplemented"):
        assert theirs not in told


@pytest.mark.parametrize("index", range(len(MALFORMED)))
def test_what_is_no_form_is_rejected_at_once(index: int) -> None:
    form, words = MALFORMED[index]
    with pytest.raises(ValueError) as caught:
        StructuredOutput(**form)
    assert str(caught.value).startswith(words) and len(str(caught.value)) < 300


def test_params_take_no_other_form() -> None:
    with pytest.raises(ValueError, match=r"^structured=.*must be an octavo.StructuredOutput"):
        SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_can_be_written(grammars: Grammars, tokenizer: Tokenizer, choice: str) -> None:
    request = request_of()
    matcher = Matcher(grammars.compile(StructuredOutput(choice=CHOICES)), request)
    ids = tokenizer.encode(choice, add_special_tokens=False).ids
    if choice == "<|im_end|>":  # the text, not the token
        ids = [tokenizer.token_to_id(letter) for letter in choice]
    request.token_ids.extend(ids)
    matcher.read()
    is_begin = any(other != choice and other.startswith(choice) for other in CHOICES)
    assert not matcher.error and matcher.is_done == (not is_begin)


def test_json_is_written_as_people_do(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Indented or not, and no more white space: a small model would write nothing else."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["b"]}}}}
    form = grammars.compile(StructuredOutput(json_schema=schema))
    value = {"a": ["b", "b"]}
    written = {json.dumps(value, indent=indent): True for indent in (None, 0, 1, 2, 4, 8)}
    written |= {'{"a":["b"]}': True, '{ "a" : [ "b" , "b" ] }': True}
    written |= {'{"a":  ["b"]}': False, '{"a":\n\n["b"]}': False, '{ \n"a": []}': False}
    for answer, is_right in written.items():
        matcher = Matcher(form, request_of())
        matcher.request.token_ids.extend(tokenizer.encode(answer, add_special_tokens=False).ids)
        matcher.read()
        assert (not matcher.error and matcher.is_done) == is_right, answer


def test_masks_are_the_models_vocabulary(tokenizer: Tokenizer) -> None:
    """Padding, special and banned tokens are never allowed, and an end only where it is one."""
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|im_end|>")
    banned = tokenizer.encode("a").ids
    grammars = Grammars(tokenizer, size + 9, frozenset({end}), banned)
    first = grammars.compile(StructuredOutput(regex=r"(?s:.+)")).first
    assert first.shape == (-(-(size + 9) // 32),)
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    expected = set(range(size)) - special - set(banned)
    plain = {id_ for text, id_ in tokenizer.get_vocab().items() if text.isascii()}
    assert plain & expected <= set(bits(first)) <= expected
    request = request_of()
    matcher = Matcher(grammars.compile(StructuredOutput(regex="b+")), request)
    assert end not in bits(matcher.allowed)
    narrow = Grammars(tokenizer, size - 5, frozenset({end}))
    row = narrow.cut(narrow_rows(narrow))
    assert max(bits(row)) == size - 6


def narrow_rows(grammars: Grammars) -> Any:
    grammars.warm()
    return grammars.new_rows(1)[0] | np.int32(-1)


def test_a_checkpoint_without_end_tokens_takes_no_form(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"^structured: is not supported with this checkpoint"):
        Grammars(tokenizer, 900, frozenset()).compile(StructuredOutput(regex="a"))


def test_forms_are_compiled_once_and_the_oldest_are_let_go(grammars: Grammars) -> None:
    first = grammars.compile(StructuredOutput(regex="first"))
    assert grammars.compile(StructuredOutput(regex="first")) is first
    for index in range(70):
        grammars.compile(StructuredOutput(regex=f"a{index}"))
    again = grammars.compile(StructuredOutput(regex="first"))
    assert again is not first
    for letter in "abcdefghi":  # 60 KB each
        grammars.compile(StructuredOutput(json_schema={"enum": [letter * 60_000]}))
    assert grammars.compile(StructuredOutput(regex="first")) is not again


def test_used_up_lexers_are_not_inherited(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of one form share its lexer's states: those of one must not end another."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 1000)
    form = StructuredOutput(regex=r"(.*a.{20}|.*b.{20}|.*c.{40})x")
    grammar = grammars.compile(form)
    ids = [tokenizer.token_to_id(letter) for letter in "abcabcabcaabbccabcabaccbabcbcbaabbcc"]
    reached = []
    for index in range(6):
        request = request_of()
        matcher = Matcher(grammar, request)
        if index == 0:  # one that shares nothing
            matcher._state, matcher._is_own = grammars.new_matcher(grammar.text), True
        for token in ids:
            request.token_ids.append(token)
            matcher.read()
            if matcher.error:
                break
            row = grammars.new_rows(1)
            matcher.state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if matcher.state.is_error() and not matcher.renew():
                break
        reached.append(matcher.num_read)
    assert grammars.compile(form) is not grammar  # it was used up
    assert 5 < reached[0] == min(reached) < len(ids), reached


def test_end_tokens_are_held_back_as_long_as_the_form_goes_on(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), frozenset({end}))
    grammar = grammars.compile(StructuredOutput(regex="b*"))
    letter = tokenizer.token_to_id("b")
    plain, ignoring = Matcher(grammar, request_of()), Matcher(grammar, request_of(ignore_eos=True))
    assert end in bits(plain.allowed) and letter in bits(plain.allowed)
    assert end not in bits(ignoring.allowed) and letter in bits(ignoring.allowed)
    request = request_of(min_tokens=2)
    request.stop_token_ids = frozenset({end})
    early = Matcher(grammar, request)
    assert end not in bits(early.allowed)
    only = grammars.new_rows(1)[0]
    only[end // 32] |= np.int32(1 << end % 32)
    early.allow(only.copy())
    assert bits(early.allowed) == [end]  # nothing else is left
    assert logit_edits([(request, 2)]) is None  # the mask has it


def test_the_sampler_keeps_to_masks() -> None:
    rng = np.random.default_rng(0)
    sampler = Sampler((7,), SeenTokens(PADDED, torch.device("cpu")))
    logits = torch.from_numpy(rng.normal(size=(3, PADDED)).astype(np.float32))
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.int32)
    batch = replace(
        empty_sampling(), rows=np.arange(3, dtype=np.int32),
        temperature=np.array([0, 0, 1.0], "f4"),
        top_k=zeros, top_p=ones, min_p=ones * 0, repetition_penalty=ones,
        seed=np.arange(3, dtype=np.uint64), output_index=zeros, slots=zeros - 1,
        seen_token_ids=(zeros[:0],) * 3,
    )  # fmt: skip
    last = torch.zeros(3, dtype=torch.int64)
    free = sampler.sample(logits, batch, last).tolist()
    allowed = np.zeros((2, -(-PADDED // 32)), np.int32)
    some = [*rng.choice(PADDED - 1, 40, replace=False).tolist(), PADDED - 1]
    for token in some:
        allowed[:, token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
    masks = TokenMasks(np.array([0, 2], np.int32), allowed)
    found = sampler.sample(logits, replace(batch, masks=masks), last).tolist()
    best = max((token for token in some if token != 7), key=lambda token: float(logits[0, token]))
    assert found[0] == best and found[1] == free[1] and found[2] in some
    allowed[0], allowed[1] = 0, 0
    allowed[0, 0] = 1 << 7  # banned
    found = sampler.sample(logits, replace(batch, masks=masks), last).tolist()
    assert found == [FORBIDDEN, free[1], FORBIDDEN]


# The model.

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMS = {
    "schema": StructuredOutput(json_schema=SCHEMA),
    "regex": StructuredOutput(regex="[a-f]{4}(-[0-9]{3}){2}"),
    "choice": StructuredOutput(choice=("left", "right", "straight on")),
    "lark": StructuredOutput(lark='start: "<" WORD+ ">"\nWORD: /[a-z]{2}/ ","'),
}
DRAWN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "logprobs": 1}
FREE = {"temperature": 1.0, "seed": 9}


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tied=False, vocab_size=PADDED)


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    device, alone = torch.device("cpu"), TensorParallel()
    made = ModelRunner(folder, config, preprocess, device, torch.float32, BLOCK_SIZE, alone)
    made.load()
    made.allocate(NUM_BLOCKS)
    return made


@pytest.fixture(scope="module")
def tiny(folder: Path, runner: ModelRunner) -> Grammars:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Grammars(tokenizer, PADDED, ENDS, runner.config.vision_token_ids)


def make_engine(runner: ModelRunner, overlap: bool = True, **limits: int) -> TinyEngine:
    given = {
        "num_blocks": NUM_BLOCKS, "max_num_seqs": 16, "max_num_batched_tokens": 512,
        "max_encode_tokens": 64, "encoder_cache_tokens": 64, **limits,
    }  # fmt: skip
    size = {"block_size": BLOCK_SIZE, "max_model_len": NUM_BLOCKS * BLOCK_SIZE}
    return TinyEngine(runner, SchedulerConfig(**size, **given), overlap)


def add(engine: TinyEngine, tiny: Grammars, name: str, num_forks: int = 0) -> None:
    """A request of a form, or one that is free."""
    form = FORMS.get(name)
    more = {**DRAWN, "seed": len(name)} if form else FREE
    params = replace(GREEDY, structured=form, **more)
    made = tiny_request(engine.runner.config, PROMPT, params)
    grammar = None if form is None else tiny.compile(form)
    engine.add(name, made, NEW_TOKENS, num_forks, grammar=grammar, stop_token_ids=ENDS)


@pytest.fixture(scope="module")
def alone(runner: ModelRunner, tiny: Grammars) -> dict[str, list[int]]:
    found = {}
    for name in (*FORMS, "free"):
        engine = make_engine(runner, overlap=False)
        add(engine, tiny, name, num_forks=2)
        engine.run()
        for each in (name, f"{name}[1]", f"{name}[2]"):
            found[each] = engine.output(each)
    return found


def check(name: str, output: list[int], folder: Path) -> None:
    """The answer has its form, or is a beginning of it where it ran out of tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    written = tokenizer.decode(output)
    if name == "free":
        return
    if len(output) == NEW_TOKENS:
        assert name in ("schema", "lark")
        return
    if name == "schema":
        found = json.loads(written)
        assert found.keys() == {"a", "b"} and type(found["a"]) is int and found["b"] in ("x", "yy")
    elif name == "regex":
        assert re.fullmatch(FORMS[name].regex or "", written)
    elif name == "choice":
        assert written in FORMS[name].choice
    else:
        assert re.fullmatch("<([a-z]{2},)+>", written)


def test_answers_have_their_form(alone: dict[str, list[int]], folder: Path) -> None:
    for name, output in alone.items():
        check(name.split("[")[0], output, folder)
    assert len({tuple(alone[name]) for name in ("regex", "regex[1]", "regex[2]")}) == 3
    ended = [name for name, output in alone.items() if len(output) < NEW_TOKENS]
    assert {"schema", "regex", "choice", "lark"} <= {name.split("[")[0] for name in ended}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_blocks": 17, "max_num_batched_tokens": 64},
        {"num_blocks": 13, "max_num_batched_tokens": 19},
    ],
    ids=["batched", "chunked", "preempted", "both"],
)
def test_batched_is_alone(
    runner: ModelRunner,
    tiny: Grammars,
    alone: dict[str, list[int]],
    overlap: bool,
    limits: dict[str, int],
) -> None:
    """And the free request beside is what it is alone."""
    engine = make_engine(runner, overlap, **limits)
    for name in ("free", *FORMS):
        add(engine, tiny, name, num_forks=2)
    names = list(engine.requests)
    engine.run()
    assert {name: engine.output(name) for name in names} == alone
    if "num_blocks" in limits:
        assert any(request.num_preemptions for request in engine.requests.values())


def test_workers_that_end_lose_no_place(
    runner: ModelRunner, tiny: Grammars, alone: dict[str, list[int]]
) -> None:
    engine = make_engine(runner)
    add(engine, tiny, "regex")
    add(engine, tiny, "free")
    for _ in range(7):
        engine.step()
    engine._on_way.clear()
    engine.scheduler.reset_after_worker_restart()
    engine._slots.reset()
    engine.runner.embeddings.clear()
    engine.run()
    for name in ("regex", "free"):
        assert engine.output(name) == alone[name]


def test_others_do_not_wait(runner: ModelRunner, tiny: Grammars) -> None:
    """A free row goes into every step, a guided one into every second."""
    engine = make_engine(runner)
    add(engine, tiny, "regex")
    add(engine, tiny, "free")
    counts = {"regex": 0, "free": 0}
    steps = 0
    while "regex" in engine.scheduler.requests and (plan := engine.step()):
        steps += 1
        for name, awaits in zip(plan.request_ids, plan.awaits, strict=True):
            counts[name] += 1
            assert name == "free" or awaits < 0
    assert counts["free"] >= steps - 1 and counts["regex"] <= steps // 2 + 1
