"""Log probabilities in responses: exact bytes, no alternative lost, bounded, written in pieces."""

from __future__ import annotations

import asyncio
import json
import math
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from tokenizers import Tokenizer

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.client.errors import ClientError
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.core.logprob_budget import LogprobBudget
from octavo.engine.errors import InputError
from octavo.engine.outputs import OutputDelta, Usage
from octavo.engine.request_stream import join
from octavo.engine.server import chunked_json
from octavo.engine.server.chunked_json import LazyList, Turns, dump
from octavo.engine.server.grpc_api import messages
from octavo.engine.server.http_api import openai_stream
from octavo.engine.server.http_api.openai_logprobs import (
    write_chat_logprobs,
    write_completion_logprobs,
    write_prompt_logprobs,
)
from octavo.engine.server.token_texts import TokenTexts
from octavo.proto import octavo_pb2 as pb
from octavo.scheduler.errors import QueueFull
from octavo.scheduler.logprobs import LogprobTable, TokenLogprobs
from octavo.tests.support.http_served import HttpServed

TEXT = "Grüße, 東京 🙂🙃! é ﷽ नमस्ते"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServed]:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    settings: dict[str, Any] = {"max_model_len": 1024, "kv_cache_memory_bytes": 8_000_000}
    served = HttpServed(checkpoint, dtype="float32", **settings)
    yield served
    served.wait_empty()
    assert served.engine.logprob_budget.num_reserved == 0
    served.close()


@pytest.fixture
def raw(served: HttpServed) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))


def entry(token: int, *top: int) -> TokenLogprobs:
    values = array("f", [-0.5 * rank for rank in range(len(top))])
    return TokenLogprobs(token, -0.25, array("i", top), values)


def entries_of(ids: list[int]) -> list[TokenLogprobs]:
    return [entry(token, token, (token + 1) % 300, (token + 2) % 300) for token in ids]


def plain(value: Any) -> Any:
    return json.loads(dump(value))


# Bytes and names of tokens


def test_bytes_of_tokens_make_the_text_in_chats(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    content = plain(write_chat_logprobs(entries_of(ids), TokenTexts(tokenizer)))["content"]
    assert any(each["token"].startswith("\\x") for each in content)  # parts of characters
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == TEXT
    assert all(isinstance(top["bytes"], list) for e in content for top in e["top_logprobs"])


def test_bytes_of_each_token_agree_with_the_tokenizer(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    size = tokenizer.get_vocab_size()
    for token in [*range(0, size, max(1, size // 3000)), *range(size - 20, size)]:
        decoded = tokenizer.decode([token], skip_special_tokens=False)
        assert texts.bytes_of(token).decode(errors="replace") == decoded
    assert texts.bytes_of(size + 5000) == b""


def test_completions_name_every_alternative_and_the_sampled_token(tokenizer: Tokenizer) -> None:
    """Parts of characters decode to one replacement character; so do ids without a token."""
    size, texts = tokenizer.get_vocab_size(), TokenTexts(tokenizer)
    parts = [token for token in range(size) if texts.key_of(token).startswith("bytes:\\x")]
    top = (*parts[:15], size + 7000, size + 7001, size + 7002)
    entries = [entry(5, *top), entry(top[0], *top), entry(size + 7003, *top)]
    found = plain(write_completion_logprobs(entries, texts, texts.offsets(True)))
    assert [len(each) for each in found["top_logprobs"]] == [19, 18, 19]
    for name, logprob, each in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert each[name] == logprob
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}


def test_text_offsets_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    texts = TokenTexts(tokenizer)
    end = next(t for t, each in tokenizer.get_added_tokens_decoder().items() if each.special)
    for shown in (False, True):
        given = [end, *ids, end]
        offsets = list(texts.offsets(not shown).of(given))
        for index, offset in enumerate(offsets):
            before = tokenizer.decode(given[:index], skip_special_tokens=not shown)
            assert offset == len(before.rstrip("\ufffd"))
        # Over the chunks of a stream as in one go.
        counter = texts.offsets(not shown)
        assert [o for token in given for o in counter.of([token])] == offsets


def test_no_value_is_infinite_in_json(tokenizer: Tokenizer) -> None:
    none = TokenLogprobs(3, -math.inf, array("i", [4]), array("f", [-math.inf]))
    texts = TokenTexts(tokenizer)
    chat = plain(write_chat_logprobs([none], texts))["content"][0]
    assert (chat["logprob"], chat["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
    told = plain(write_prompt_logprobs([None, none], texts))
    assert told[0] is None and [each["logprob"] for each in told[1].values()] == [-9999.0] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_completions_over_http_have_all_fields(raw: httpx2.Client, stream: bool) -> None:
    body = {"prompt": "A cat", "max_tokens": 20, "logprobs": 3, "temperature": 2, "seed": 5}
    response = raw.post("/v1/completions", json={**body, "ignore_eos": True, "stream": stream})
    if stream:
        lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
    else:
        choices = response.json()["choices"]
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens, logprobs, tops, offsets = (
        [each for part in told for each in part[name]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert len(tokens) == len(logprobs) == len(tops) == len(offsets) == 20
    assert all(top[name] == p for name, p, top in zip(tokens, logprobs, tops, strict=True))
    assert all(3 <= len(top) <= 4 for top in tops)
    assert offsets == sorted(offsets) and offsets[0] == 0
    text = "".join(choice["text"] for choice in choices)
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith(("bytes:", "<|", "token_id:")):
            assert text[offset : offset + len(token)] == token


# Limits at admission


@pytest.mark.lesson("L37")
def test_response_size_is_bounded_by_name() -> None:
    params = octavo.SamplingParams(max_tokens=1, prompt_logprobs=20)
    budget = LogprobBudget()
    with budget.call(params, 32768) as charge:
        with pytest.raises(InputError, match=r"^prompt_logprobs: .*2097152 .*fewer") as caught:
            for _ in range(64):
                charge.add(2000)
        assert caught.value.field == "prompt_logprobs"
        assert 0 < budget.num_reserved <= budget.max_request
    assert budget.num_reserved == 0
    answers = octavo.SamplingParams(n=64, logprobs=20)
    with budget.call(answers, 32768) as charge, pytest.raises(InputError, match=r"^logprobs: .*n "):
        charge.add(10)


@pytest.mark.parametrize(
    ("params", "prompts"),
    [
        (octavo.SamplingParams(max_tokens=1, prompt_logprobs=1), [32_000]),
        (octavo.SamplingParams(max_tokens=1, prompt_logprobs=1), [4096] * 64),
        (octavo.SamplingParams(max_tokens=4096, logprobs=20, n=8), [1000]),
        (octavo.SamplingParams(logprobs=20), [10]),
        (octavo.SamplingParams(logprobs=5, n=8), [10]),
        (octavo.SamplingParams(n=64), [10]),
    ],
)
def test_what_evaluations_ask_for_fits(params: octavo.SamplingParams, prompts: list[int]) -> None:
    with LogprobBudget().call(params, 32768) as charge:
        for count in prompts:
            charge.add(count)


def test_requests_are_bounded_together_and_one_alone_passes() -> None:
    params = octavo.SamplingParams(max_tokens=100, logprobs=1)
    budget = LogprobBudget(max_request=1000, max_total=150)
    with budget.call(params, 1000) as first:
        first.add(10)
        assert budget.num_reserved == 200  # nothing else was reserved
        with budget.call(params, 1000) as second, pytest.raises(QueueFull, match="try again"):
            second.add(10)
        with budget.call(octavo.SamplingParams(max_tokens=5), 1000) as other:
            other.add(10)  # it asks for none
    assert budget.num_reserved == 0


@pytest.mark.lesson("L37")
@pytest.mark.parametrize("stream", [False, True])
def test_http_rejects_what_is_too_large(
    served: HttpServed, raw: httpx2.Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(served.engine.logprob_budget, "max_request", 100)
    body = {"prompt": ["a b c d e f g h"] * 8, "max_tokens": 1, "prompt_logprobs": 20}
    response = raw.post("/v1/completions", json={**body, "stream": stream})
    if not stream:
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt_logprobs"
    assert "may ask for 100" in response.text
    assert raw.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    with octavo.Client(served.address) as client:
        for call in (client.generate_once, lambda *a, **k: list(client.generate(*a, **k))):
            with pytest.raises(ClientError, match="may ask for 100") as caught:
                call("a b c d e f", logprobs=20, max_tokens=20)
            assert caught.value.field == "logprobs"
    served.wait_empty()
    assert served.engine.logprob_budget.num_reserved == 0


# Pieces


def test_pieces_are_the_same_json_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {
        "a": [],
        "b": {},
        "c": LazyList(lambda: ([index, "é\u2028"] for index in range(5000))),
        "d": [1, None, {"e": LazyList(list), "f": (1, 2)}],
    }
    monkeypatch.setattr(chunked_json, "PIECE_BYTES", 1000)
    pieces = list(chunked_json.json_pieces(value))
    assert b"".join(pieces) == dump(value)
    assert len(pieces) > 40 and max(map(len, pieces)) < 1500
    assert json.loads(dump(value))["c"][-1] == [4999, "é\u2028"]


def test_one_piece_is_made_at_a_time_and_only_as_they_are_taken() -> None:
    made = [0, 0]
    order: list[int] = []

    def pieces(index: int) -> Iterator[int]:
        for number in range(5):
            made[index] += 1
            order.append(index)
            yield number

    async def run() -> None:
        turns, idle = Turns(), 0
        first = turns.paced(pieces(0))
        await anext(first)
        for _ in range(20):
            await asyncio.sleep(0)
        assert made == [1, 0]  # a client that does not read

        async def take(stream: AsyncIterator[int]) -> None:
            async for _ in stream:
                pass

        tasks = [asyncio.create_task(take(each)) for each in (first, turns.paced(pieces(1)))]
        while not all(task.done() for task in tasks):
            idle += 1
            await asyncio.sleep(0)
        assert made == [5, 5] and idle >= 9  # others run between any two pieces
        assert order[1:7] in ([0, 1] * 3, [1, 0] * 3)

    asyncio.run(run())


def test_large_responses_come_in_pieces(
    raw: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "a b c d " * 40, "max_tokens": 4, "prompt_logprobs": 5, "temperature": 0}
    small = raw.post("/v1/completions", json={**body, "prompt_logprobs": None, "logprobs": 1})
    assert int(small.headers["content-length"]) == len(small.content)
    monkeypatch.setattr(chunked_json, "PIECE_BYTES", 500)
    monkeypatch.setattr(openai_stream, "MAX_INLINE_LOGPROBS", 0)
    large = raw.post("/v1/completions", json=body)
    assert large.headers["transfer-encoding"] == "chunked"
    told = large.json()["choices"][0]["prompt_logprobs"]
    streamed = raw.post("/v1/completions", json={**body, "stream": True, "logprobs": 2}).text
    chunks = [json.loads(line[6:]) for line in streamed.split("\n\n") if line[:7] == "data: {"]
    again = chunks[0]["choices"][0]["prompt_logprobs"]
    assert [each and list(each) for each in again] == [each and list(each) for each in told]
    assert len(told) == large.json()["usage"]["prompt_tokens"]


def test_grpc_streams_cut_log_probabilities_into_messages(
    served: HttpServed, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a b c d " * 40
    with octavo.Client(served.address) as client:
        ask: dict[str, Any] = {"max_tokens": 5, "prompt_logprobs": 2, "logprobs": 2}
        ask |= {"temperature": 0, "ignore_eos": True}
        (whole,) = client.generate_once(prompt, **ask).answers
        monkeypatch.setattr(messages, "PIECE_TOKENS", 3)
        deltas = list(client.generate(prompt, **ask))
        (pieced,) = client.generate_once(prompt, **ask).answers
    told = [each for delta in deltas for each in delta.prompt_logprobs]
    assert max(len(delta.prompt_logprobs) for delta in deltas) <= 3
    assert len(told) == len(whole.prompt_logprobs) == len(pieced.prompt_logprobs) > 50
    for one, other in zip(told, whole.prompt_logprobs, strict=True):
        assert (one and one.top_token_ids) == (other and other.top_token_ids)
    for found in (deltas, [pieced]):
        assert "".join(delta.text for delta in found) == whole.text
        assert [t for delta in found for t in delta.token_ids] == list(whole.token_ids)
        assert [e.token_id for d in found for e in d.logprobs] == list(whole.token_ids)
    assert deltas[-1].usage is not None and pieced.finish_reason == "length"


def test_a_joined_delta_is_cut_with_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE_TOKENS", 4)
    deltas = [
        OutputDelta("it", text="x", token_ids=(t,), logprobs=(entry(t, t, 1),)) for t in range(10)
    ]
    joined = replace(join(deltas), prompt_logprobs=LogprobTable([None, *entries_of([1] * 8)]))
    pieces = list(messages.split_delta(replace(joined, finish_reason="stop")))
    assert [len(each.prompt_logprobs) for each in pieces] == [4, 4, 1, 0, 0, 0]
    assert [len(each.logprobs) for each in pieces] == [0, 0, 0, 4, 2, 4]
    assert [t for each in pieces for t in each.token_ids] == list(range(10))
    assert all(len(each.token_ids) == len(each.logprobs) for each in pieces)
    assert [each.text for each in pieces[-2:]] == ["", "x" * 10]
    assert [each.finish_reason for each in pieces] == [None] * 5 + ["stop"]


def test_a_reply_is_serialized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes parse as the message that protobuf merges from the pieces."""
    monkeypatch.setattr(messages, "PIECE_TOKENS", 4)
    answers = []
    for index in range(3):
        tokens = range(index * 100)
        deltas = [
            OutputDelta("it", index, text="x", token_ids=(t,), logprobs=(entry(t, t, 1),))
            for t in tokens
        ]
        last = OutputDelta("it", index, finish_reason="stop", usage=Usage(3, 200))
        answers.append(join([*deltas, last]))
    expected = messages._reply_head(answers)
    for answer in answers:
        message = expected.answers.add()
        for piece in messages.split_delta(replace(answer, usage=None)):
            message.MergeFrom(messages.write_delta(piece))
    pieces = list(messages.reply_pieces(answers))
    assert pb.GenerateReply.FromString(b"".join(pieces)) == expected
    assert len(pieces) > 75 and max(map(len, pieces)) < 1000
    assert len(expected.answers[2].logprobs) == 200 and expected.usage.output_tokens == 200


# Storage


def test_a_table_is_a_sequence_of_its_entries() -> None:
    entries = [None, entry(3, 4, 5), entry(6), None, entry(7, 8)]
    table = LogprobTable(entries)
    assert table == entries and list(table) == entries and len(table) == 5
    assert table[1:4] == entries[1:4] and table[-1] == entries[-1]
    other = LogprobTable(entries[1:3])
    other.extend(table)
    other.extend(iter(entries))
    assert other == [*entries[1:3], *entries, *entries]
    assert other != entries and other != entries[:-1]
    with pytest.raises(IndexError):
        table[5]


def test_what_a_slow_reader_has_not_read_is_kept_in_arrays() -> None:
    deltas = [OutputDelta("it", token_ids=(1,), logprobs=(entry(1, 2),)) for _ in range(9)]
    joined = join([join(deltas), *deltas])
    assert isinstance(joined.logprobs, LogprobTable) and joined.logprobs == [entry(1, 2)] * 18


# The event loop


@pytest.mark.lesson("L37")
@pytest.mark.slow
@pytest.mark.parametrize("api", ["whole", "stream", "grpc", "grpc once"])
def test_the_largest_response_never_holds_the_loop(api: str) -> None:
    """CPU time of each callback of the loop, so that other load on the machine does not count."""
    longest = 0.0
    run = asyncio.events.Handle._run

    def timed(handle: Any) -> None:
        nonlocal longest
        start = time.thread_time()
        run(handle)
        longest = max(longest, time.thread_time() - start)

    settings: dict[str, Any] = {"max_model_len": 8192, "kv_cache_memory_bytes": 64 << 20}
    settings["max_num_batched_tokens"] = 2048
    with pytest.MonkeyPatch.context() as patch:
        served = HttpServed(EMBEDDED_MODEL, dtype="float32", **settings)
        try:
            patch.setattr(asyncio.events.Handle, "_run", timed)
            size = _largest(served, api)
        finally:
            served.close()
    assert size > 1_000_000
    assert longest < 0.05, f"{longest * 1e3:.0f} ms"


def _largest(served: HttpServed, api: str) -> int:
    """Ask for as much as is accepted: 16 prompts (of gRPC one) of 6,000 tokens."""
    prompt = [64] * 6000
    if api.startswith("grpc"):
        with octavo.Client(served.address) as client:
            ask: dict[str, Any] = {"max_tokens": 1, "prompt_logprobs": 20}
            if api == "grpc":
                deltas = list(client.generate(prompt, **ask))
                return sum(len(e.top) for d in deltas for e in d.prompt_logprobs if e) * 10
            (answer,) = client.generate_once(prompt, **ask).answers
            return sum(len(e.top) for e in answer.prompt_logprobs if e) * 10
    body: dict[str, Any] = {"prompt": [prompt] * 16, "max_tokens": 1, "prompt_logprobs": 20}
    body["stream"] = api == "stream"
    with (
        httpx2.Client(base_url=served.url, timeout=300) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        return sum(map(len, response.iter_bytes()))
