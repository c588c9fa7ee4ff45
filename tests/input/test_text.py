"""Long and hard texts: the same ids as the whole text, in bounded work, without holding the GIL."""

import asyncio
import contextlib
import gc
import itertools
import json
import random
import threading
import time
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fuzz.text import (
    RUNS,
    Watcher,
    differing,
    longest_block,
    longest_hold,
    write_large_tokenizer,
)
from octavo.engine.config.engine_config import EMBEDDED_MODEL, ModelConfig, PreprocessConfig
from octavo.engine.errors import InputError, TooLong
from octavo.engine.input import pieces
from octavo.engine.input.parsed_prompt import LONG_TEXT, ParsedPrompt, PromptSize
from octavo.engine.input.preprocess_pool import InputPool
from octavo.engine.input.processor import InputProcessor
from octavo.engine.input.tokenizer import TextBudget, TextTokenizer
from octavo.engine.media.task import MediaTask
from octavo.engine.server.grpc_api import wire_check
from octavo.engine.server.http_api.errors import ApiError
from octavo.engine.server.http_api.openai_request import read_chat, read_request
from octavo.engine.utils import json_reader, readers
from octavo.proto import octavo_pb2 as pb
from octavo.scheduler.errors import QueueFull
from octavo.scheduler.params import SamplingParams

MAX_HOLD = 0.05  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """8,000 tokens with Qwen's rules."""
    where = tmp_path_factory.mktemp("tokenizer")
    write_large_tokenizer(where)
    return TextTokenizer(where)


def make_processor(folder: Path, max_model_len: int) -> InputProcessor:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    return InputProcessor(folder, config, preprocess, max_model_len)


class Counting:
    """A tokenizer that counts what it is given to encode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.num_characters, self.longest = tokenizer, 0, 0

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        assert len(texts) == 1, "more would take more than one core"
        self.num_characters += len(texts[0])
        self.longest = max(self.longest, len(texts[0]))
        return self._tokenizer.encode_batch_fast(texts, **options)


@pytest.fixture
def counting(merging: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting(merging._plain)
    monkeypatch.setattr(merging, "_plain", counting)
    return counting


# The same ids


@pytest.mark.lesson("L36")
def test_pieces_encode_to_the_ids_of_the_whole_text(
    merging: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2)  # cut wherever it can be
    assert not any(itertools.islice(differing(merging, seed=1), 400))


@pytest.mark.lesson("L36")
@pytest.mark.parametrize("name", RUNS)
def test_runs_in_pieces_encode_to_the_ids_of_the_whole_text(
    merging: TextTokenizer, name: str
) -> None:
    text = RUNS[name] * (20_000 // len(RUNS[name]))
    assert merging.encode_marked(text) == merging.backend.encode(text).ids


def test_characters_have_the_kinds_that_the_tokenizers_library_sees() -> None:
    every = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x32000), *range(0xE0000, 0xE0200))]
    for kind in ("L", "N"):
        split = pre_tokenizers.Split(Regex(rf"\p{{{kind}}}+"), "removed")
        others = set("".join(part for part, _ in split.pre_tokenize_str("".join(every))))
        known = [c for c in every if pieces.kind_of(c) not in ("", "C")]
        assert {c for c in known if pieces.kind_of(c) == kind} == {*known} - others
    split = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    others = set("".join(part for part, _ in split.pre_tokenize_str("".join(every))))
    spaces = {*every} - others
    assert all(c.isspace() for c in spaces)
    assert not any(pieces.kind_of(c) in ("L", "N", "P", "S") for c in spaces)


def test_no_character_that_may_begin_a_piece_combines_with_one_before_it() -> None:
    for code in range(0x1FFFF):
        character = chr(code)
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            assert not pieces._starts(chr(int(parts[1], 16)))
        if pieces._starts(character):
            assert unicodedata.combining(character) == 0
        if pieces.kind_of(character) == "N":
            assert unicodedata.normalize("NFC", character) == character


def test_tokenizers_with_other_rules_are_not_cut(folder: Path, tmp_path: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    assert pieces.can_cut(rules)
    assert pieces.can_cut(json.loads((EMBEDDED_MODEL / "tokenizer.json").read_text()))
    split, to_bytes = rules["pre_tokenizer"]["pretokenizers"]
    for other in (
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"pretokenizers": [{**split, "pattern": {"Regex": r"\d{3}"}}, to_bytes]}},
        {"pre_tokenizer": {"pretokenizers": [split, {**to_bytes, "add_prefix_space": True}]}},
    ):
        assert not pieces.can_cut({**rules, **other})
    (tmp_path / "tokenizer.json").write_text(json.dumps({**rules, "normalizer": {"type": "NFKC"}}))
    tokenizer = TextTokenizer(tmp_path)
    assert len(tokenizer.encode_plain("1 " * 5000)) == 10_000
    with pytest.raises(InputError, match="140000 bytes; the maximum is 131072"):
        tokenizer.encode_plain("1 " * 70_000)


def test_added_tokens_that_look_around_them_are_parsed_by_the_library(
    folder: Path, tmp_path: Path
) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["added_tokens"][2]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    tokenizer = TextTokenizer(tmp_path)
    text = "a   <|im_end|> b"
    assert tokenizer.encode_marked(text) == tokenizer.backend.encode(text).ids
    assert len(tokenizer.encode_marked(text)) == 4


def test_added_tokens_are_found_across_the_windows_of_the_search(
    merging: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a<|im_end|><|im_<|vision_pad|>b<|im_end|" * 3
    expected = merging.backend.encode(text).ids
    for window in range(1, 30):
        monkeypatch.setattr("octavo.engine.input.tokenizer.WINDOW", window)
        assert merging.encode_marked(text) == expected


def test_truncation_and_padding_of_a_checkpoint_do_not_change_prompts(
    folder: Path, tmp_path: Path
) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    assert len(TextTokenizer(tmp_path).encode_marked("abcdefgh")) == 8


# Bounded work


@pytest.mark.lesson("L36")
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("context", [500, 4000])
def test_work_for_a_text_that_is_too_long_follows_the_context(
    merging: TextTokenizer, counting: Counting, name: str, context: int
) -> None:
    text = RUNS[name] * (8_000_000 // len(RUNS[name]))
    budget = TextBudget(context)
    with pytest.raises(InputError, match=f"max_model_len={context}|without a space"):
        merging.encode_marked(text, budget)
    assert counting.num_characters <= context * merging.longest + pieces.PIECE
    if name in ("digits", "contractions", "words", "mixed"):
        assert counting.num_characters <= context * 6 + pieces.PIECE
    assert counting.longest <= pieces.PIECE


@pytest.mark.lesson("L36")
def test_text_of_many_messages_counts_together(folder: Path) -> None:
    processor = make_processor(folder, 4096)
    counting = processor.tokenizer._plain = Counting(processor.tokenizer._plain)
    messages = [{"role": "user", "content": "12345 " * 100}] * 800  # fits by characters
    with pytest.raises(TooLong, match="max_model_len=4096"):
        processor.from_prompt(messages)
    assert counting.num_characters < 6000


@pytest.mark.lesson("L36")
def test_run_without_a_cut_is_rejected_before_it_is_encoded(
    merging: TextTokenizer, counting: Counting
) -> None:
    with pytest.raises(InputError, match="over 131072 bytes without a space"):
        merging.encode_plain("a" * 131_073)
    assert counting.num_characters == 0
    assert len(merging.encode_plain("a" * 131_072)) > 0


@pytest.mark.lesson("L36")
def test_memory_of_a_rejected_text_is_bounded(merging: TextTokenizer) -> None:
    """Python's share: ids are kept up to the limit alone. The library's is a piece's."""
    text = "1" * 4_000_000
    tracemalloc.start()
    with pytest.raises(TooLong):
        merging.encode_plain(text, TextBudget(10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.lesson("L36")
def test_encoding_stops_when_the_request_has_ended(
    merging: TextTokenizer, counting: Counting
) -> None:
    checks = itertools.count(1)

    def check() -> None:
        if next(checks) == 4:
            raise InputError("prompt", "the request is over")

    with pytest.raises(InputError, match="over"):
        merging.encode_plain("1 2 " * 100_000, TextBudget(1 << 20, check))
    assert 2 * pieces.PIECE < counting.num_characters <= 3 * pieces.PIECE


@pytest.mark.lesson("L36")
def test_cancelled_task_ends_text(folder: Path) -> None:
    processor = make_processor(folder, 4096)
    task = MediaTask(processor.limits)
    task.cancel()
    with pytest.raises(InputError, match="the request was cancelled"):
        processor.begin("hello", task=task)


# The pool


class Slow:
    """A processor whose long texts wait for `goes_on`."""

    def __init__(self) -> None:
        self.limits = make_processor(EMBEDDED_MODEL, 64).limits
        self.goes_on = threading.Event()

    def begin(self, prompt: Any, task: Any) -> Any:
        if PromptSize.of(prompt).lane == "long_texts":
            assert self.goes_on.wait(30)
        raise InputError("prompt", "bad")


@pytest.mark.lesson("L36")
def test_short_texts_do_not_wait_for_long_ones() -> None:
    slow = Slow()
    pool = InputPool(slow)  # type: ignore[arg-type]
    long = [{"role": "user", "content": [{"type": "text", "text": "x" * (LONG_TEXT + 1)}]}]
    jobs = [pool.submit(ParsedPrompt.of(long)) for _ in range(8)]
    assert isinstance(pool.submit(ParsedPrompt("short")).future.exception(30), InputError)
    assert not any(job.future.done() for job in jobs)
    slow.goes_on.set()
    for job in jobs:
        assert isinstance(job.future.exception(30), InputError)
        job.cancel()
    pool.close()


@pytest.mark.parametrize(
    ("prompt", "lane", "size"),
    [
        ("x" * LONG_TEXT, "text", 0),
        ("x" * (LONG_TEXT + 1), "long_texts", LONG_TEXT),
        ({"prompt": "😀" * (LONG_TEXT + 1)}, "long_texts", 4 * LONG_TEXT),
        ({"prompt_token_ids": [1] * (LONG_TEXT + 1)}, "long_texts", 40 * LONG_TEXT),
        ({"messages": [{"role": "user", "content": "x" * 70_000}]}, "long_texts", 70_000),
        ([{"role": "user", "content": "x" * 1000}] * 100, "long_texts", 100_000),
        ({"prompt": "x" * 70_000, "images": [b"1"]}, "images", 70_000),
    ],
)
def test_long_texts_have_threads_and_bytes_of_their_own(prompt: Any, lane: str, size: int) -> None:
    found = PromptSize.of(ParsedPrompt.of(prompt))
    assert found.lane == lane
    assert size <= found.text_bytes <= size + 100 * 100 + 100


@pytest.mark.lesson("L36")
def test_long_texts_that_wait_are_bounded_together() -> None:
    slow = Slow()
    pool = InputPool(slow, max_bytes=200_000)  # type: ignore[arg-type]
    jobs = [pool.submit(ParsedPrompt("x" * 80_000)) for _ in range(2)]
    with pytest.raises(QueueFull, match="long texts"):
        pool.submit(ParsedPrompt("x" * 80_000))
    with pytest.raises(QueueFull, match="long texts"):
        pool.tokenize("x" * 400_000, plain=True)
    pool.submit(ParsedPrompt("short")).cancel()
    for job in jobs:
        job.cancel()
    pool.submit(ParsedPrompt("x" * 80_000)).cancel()
    slow.goes_on.set()
    pool.close()


@pytest.mark.lesson("L36")
def test_bad_words_are_encoded_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []
    encode = TextTokenizer.encode_plain

    def seen(self: TextTokenizer, text: str, budget: TextBudget | None = None) -> list[int]:
        where.append(threading.current_thread().name)
        return encode(self, text, budget)

    with octavo.LLM(max_model_len=64) as llm:
        monkeypatch.setattr(TextTokenizer, "encode_plain", seen)
        llm.generate("hi", SamplingParams(bad_words=("no", "never"), max_tokens=1))
    assert len(where) > 4
    assert all(name.startswith("text") for name in where)


def test_tokenize_is_bounded_by_the_context(folder: Path) -> None:
    processor = make_processor(folder, 100)
    assert len(processor.reader.tokenize("1" * 100, plain=True)) == 100
    with pytest.raises(TooLong, match="max_model_len=100"):
        processor.reader.tokenize("1" * 101, plain=True)


# Messages and bodies


def test_large_json_is_read_as_json_loads_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    monkeypatch.setattr(json_reader, "SMALL", 0)
    for index in range(3000):
        monkeypatch.setattr(json_reader, "PART", (1, 3, 1 << 20)[index % 3])
        text = json.dumps(_value(rng), ensure_ascii=index % 2 == 0, indent=(None, 1)[index % 5 > 3])
        data = bytearray(text.encode("utf-8", "replace"))
        for _ in range(rng.randrange(3)):
            data[rng.randrange(len(data))] = rng.choice(b'",:[]{}\\ 0aeu\x80\n-.')
        found = [
            _outcome(read, bytes(data)) for read in (json_reader._loads, json_reader.read_json)
        ]
        assert repr(found[0]) == repr(found[1]), bytes(data)


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return rng.choice([None, True, False, "", [], {}])
    if kind == 1:
        return rng.choice([0, -5, 10**30, 2**53 + 1, 1.5, -2e-7])
    if kind < 4:
        return "".join(rng.choices('a"\\\né中😀/\x01\ud83d\ude00\x7f ', k=rng.randrange(30)))
    if kind < 6:
        return rng.choices([1, 2.5, -3, 10**20], k=rng.randrange(9))
    if kind < 8:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(6))]
    return {str(_value(rng, 5)): _value(rng, depth + 1) for _ in range(rng.randrange(6))}


def _outcome(read: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return read(data)
    except (ValueError, RecursionError, ApiError):
        return "an error"


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": {' + b",".join(b'"%d": 1' % i for i in range(30_000)) + b"}}",
        b"[" + b'"a",' * 40_000 + b"1]",
        b"[" + b"[],{}," * 30_000 + b"1]",
        b"[" + b"1," * 410_000 + b"1]",
    ],
)
def test_json_of_too_many_parts_is_rejected(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_reader, "MAX_ITEMS", json_reader.MAX_ITEMS // 10)
    monkeypatch.setattr(json_reader, "MAX_NUMBERS", json_reader.MAX_NUMBERS // 10)
    with pytest.raises(json_reader.TooManyParts, match="over"):
        json_reader.read_json(data)


@pytest.mark.parametrize("data", [b"[" * 300_000, b'{"a":' * 300_000, b'"' + b"a" * 200_000])
def test_json_that_nests_or_does_not_end_is_rejected(data: bytes) -> None:
    with pytest.raises(ValueError):
        json_reader.read_json(data)


def _field(number: int, data: bytes) -> bytes:
    size, out = len(data), bytearray([number << 3 | 2])
    while size >= 128:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes((*out, size)) + data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_field(2, b"\x0a\x00" * 80_000), "over 30000 fields"),
        (_field(6, b"\x42\x00" * 80_000), "over 30000 fields"),
        (b"\x2a\x00" * 80_000, "over 30000 fields"),
        (_field(4, _field(1, b"\x01" * (5 << 20))), "bytes of packed numbers"),
        (_field(3, b"a" * (33 << 20)), "bytes of text"),
    ],
)
def test_protobuf_of_too_many_fields_is_rejected_before_it_is_parsed(
    data: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_check, "MAX_FIELDS", 30_000)
    with pytest.raises(wire_check.TooManyFields, match=words):
        wire_check.check_wire(data, pb.GenerateRequest.DESCRIPTOR)


def test_largest_valid_requests_pass_the_check_of_their_fields() -> None:
    request = pb.GenerateRequest()
    for _ in range(4096):
        message = request.conversation.messages.add(role="user")
        for _ in range(4):
            message.content.add(text="some words of a part")
    request.media.add(kind=1, data=bytes(50 << 20))
    request.media.add(kind=1, url="data:image/png;base64," + "A" * (50 << 20))
    wire_check.check_wire(request.SerializeToString(), pb.GenerateRequest.DESCRIPTOR)
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[151_000] * 1_000_000))
    wire_check.check_wire(ids.SerializeToString(), pb.GenerateRequest.DESCRIPTOR)


def test_any_bytes_pass_the_check_of_fields_without_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire_check, "SMALL", 0)
    rng = random.Random(0)
    for _ in range(5000):
        wire_check.check_wire(rng.randbytes(rng.randrange(60)), pb.GenerateRequest.DESCRIPTOR)


# Measured: the GIL and event loops


def bodies() -> Iterator[tuple[str, bytes]]:
    """Bodies at the limits, or a little over them."""
    for name, run in {**RUNS, "escapes": "\\u4e2d", "quotes": '\\"', "slashes": "\\\\"}.items():
        text = json.dumps(run * (12_000_000 // len(run)), ensure_ascii=False)
        content = text if name in RUNS else f'"{run * 2_000_000}"'
        yield name, f'{{"messages":[{{"role":"user","content":{content}}}]}}'.encode()
    parts = [{"type": "text", "text": "a"}] * 4
    yield "parts", json.dumps({"messages": [{"role": "user", "content": parts}] * 4096}).encode()
    yield "keys", json.dumps({f"k{i}": None for i in range(1_000_000)}).encode()
    yield "numbers", json.dumps({"messages": [123_456] * 3_000_000}).encode()


@pytest.mark.lesson("L36")
@pytest.mark.slow
def test_bodies_hold_neither_gil_nor_event_loop() -> None:
    gc.collect()
    gc.freeze()  # as the server does: what this process has imported is not gone through
    holds, blocks = {}, {}
    for name, body in bodies():
        with Watcher() as watcher:
            _, blocked = asyncio.run(longest_block(lambda body=body: _read_body(body)))
        holds[name], blocks[name] = round(watcher.longest, 3), round(blocked, 3)
    gc.unfreeze()
    print(holds, blocks)
    assert max(holds.values()) < MAX_HOLD, holds
    assert max(blocks.values()) < MAX_HOLD, blocks


async def _read_body(body: bytes) -> None:
    """As the endpoints do, up to the pool."""
    with contextlib.suppress(ValueError, ApiError):
        asked = await readers.read(lambda: read_request(body, "m", read_chat), True)
        PromptSize.of(asked.prompts[0])


@pytest.mark.lesson("L36")
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_hard_texts_do_not_hold_the_gil(merging: TextTokenizer, name: str) -> None:
    for size in (130_000, 4_000_000):
        text = RUNS[name] * (size // len(RUNS[name].encode()))
        assert longest_hold(merging, text, 1 << 20) < MAX_HOLD


@pytest.mark.lesson("L36")
@pytest.mark.slow
def test_random_texts_encode_to_the_ids_of_the_whole_text(
    merging: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2)
    assert not any(itertools.islice(differing(merging, seed=2), 20_000))


@pytest.mark.lesson("L36")
@pytest.mark.slow
@pytest.mark.slow
def test_timeout_ends_a_long_text_in_time_and_frees_its_thread(folder: Path) -> None:
    """At a context of a million tokens a text takes seconds."""

    async def run() -> None:
        text = "1 2 3 4 " * 125_000
        async with octavo.AsyncLLM(folder, max_model_len=1 << 15) as engine:
            engine.engine.processor.reader.max_model_len = 1 << 20
            started = time.monotonic()
            _, blocked = await longest_block(lambda: _end_of(engine, text))
            assert time.monotonic() - started < 1.0
            assert blocked < MAX_HOLD
            started = time.monotonic()
            with pytest.raises(InputError):
                await engine.tokenize("x" * (LONG_TEXT * 4), plain=True)  # in the same threads
            assert time.monotonic() - started < 1.0

    asyncio.run(run())


async def _end_of(engine: octavo.AsyncLLM, text: str) -> None:
    errors = [delta.error async for delta in engine.generate(text, timeout_s=0.3) if delta.error]
    assert errors and "DEADLINE_EXCEEDED" in errors[0]


def test_a_long_text_of_a_tokenizer_that_cannot_be_cut_is_rejected_with_its_size() -> None:
    words = "one two " * (1 << 14)
    assert list(pieces.pieces(words, cuts=False, field="prompt")) == [words]
    with pytest.raises(InputError) as caught:
        list(pieces.pieces(words + "é", cuts=False, field="prompt"))
    assert "131074 bytes; the maximum is 131072" in str(caught.value)
    assert "cannot encode a text in parts; shorten it" in str(caught.value)
    with pytest.raises(InputError, match="without a space"):
        list(pieces.pieces("x" * (pieces.MAX_RUN + 1), cuts=True, field="prompt"))
