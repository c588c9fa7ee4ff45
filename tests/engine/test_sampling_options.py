"""logprobs, penalties, logit_bias, bad_words, min_tokens, shown stop strings and special tokens:
the same through LLM, AsyncLLM, gRPC and the client, and bounded at each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import SPECIAL_IDS, write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served
from octavo.engine.client.client import Client, ClientDelta, ClientError
from octavo.engine.input.tokenizer import TextTokenizer
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

PROMPT = "Once upon a time there was a picture of a cat."
GREEDY = octavo.SamplingParams(
    temperature=0.0, max_tokens=24, ignore_eos=True, repetition_penalty=1.0
)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 4,
}
END = SPECIAL_IDS["<|im_end|>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    served = Served(checkpoint, **SETTINGS)
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[octavo.LLM]:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        yield llm
        assert not llm.engine.has_requests
        llm.engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> TextTokenizer:
    return TextTokenizer(checkpoint)


def given(params: octavo.SamplingParams) -> dict[str, Any]:
    """As the client takes them: all that is not the default."""
    defaults = vars(octavo.SamplingParams())
    changed = {name: value for name, value in vars(params).items() if value != defaults[name]}
    return {**changed, "logit_bias": dict(params.biases)}


Told = tuple[list[Any], str | None, str, list[int], list[Any]]


def by_client(served: Served, params: octavo.SamplingParams) -> Told:
    with Client(served.address) as client:
        return joined(list(client.generate(PROMPT, **given(params))))


def joined(deltas: list[Any]) -> Told:
    first = deltas[0]
    assert not any(delta.prompt_logprobs for delta in deltas if delta is not first)
    assert isinstance(first, ClientDelta | octavo.engine.outputs.OutputDelta)
    return (
        [entry for delta in deltas for entry in delta.logprobs],
        deltas[-1].finish_reason,
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.token_ids],
        list(first.prompt_logprobs),
    )


def by_llm(llm: octavo.LLM, params: octavo.SamplingParams) -> Told:
    (out,) = llm.generate([PROMPT], params)
    answer = out.outputs[0]
    about = (answer.logprobs, answer.finish_reason, answer.text, answer.token_ids)
    return *about, list(out.prompt_logprobs)


def by_async_llm(served: Served, params: octavo.SamplingParams) -> Told:
    async def collect() -> list[Any]:
        return [delta async for delta in served.engine.generate(PROMPT, params)]

    return joined(served.run(collect()))


ASKED = {
    "logprobs": {"logprobs": 4, "prompt_logprobs": 2},
    "chosen": {"logprobs": 0, "prompt_logprobs": 0},
    "penalties": {"presence_penalty": 0.75, "frequency_penalty": -0.5, "temperature": 0.5},
    "bias": {"logit_bias": {70: 8.5, 71: 8.0, 3: -100}, "logprobs": 20, "seed": 6},
    "min_tokens": {"ignore_eos": False, "logit_bias": {END: 100.0}, "min_tokens": 7},
    "shown": {"ignore_eos": False, "logit_bias": {END: 100.0}, "min_tokens": 3,
              "skip_special_tokens": False},
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_all_servers_tell_the_same(llm: octavo.LLM, served: Served, name: str) -> None:
    params = replace(GREEDY, **{"seed": 3, **ASKED[name]})
    expected = by_llm(llm, params)
    assert by_async_llm(served, params) == expected
    assert by_client(served, params) == expected
    logprobs, _, _, token_ids, of_prompt = expected
    assert len(logprobs) == (len(token_ids) if params.logprobs is not None else 0)
    assert all(entry.token_id == token for entry, token in zip(logprobs, token_ids, strict=False))
    assert all(len(entry.top) == params.logprobs for entry in logprobs)
    assert bool(of_prompt) == (params.prompt_logprobs is not None)


def test_prompt_logprobs_name_the_prompt_s_tokens(
    llm: octavo.LLM, tokenizer: TextTokenizer
) -> None:
    params = replace(GREEDY, prompt_logprobs=1, n=3, max_tokens=2)
    (out,) = llm.generate([PROMPT], params)
    first, *others = out.prompt_logprobs
    assert first is None and all(entry is not None for entry in others)
    ids = [entry.token_id for entry in others if entry is not None]
    assert ids == out.prompt_token_ids[1:] == tokenizer.encode_marked(PROMPT)[1:]
    assert all(-40 < entry.logprob < 0 and len(entry.top) == 1 for entry in others if entry)
    assert [len(answer.token_ids) for answer in out.outputs] == [2] * 3


def test_min_tokens_holds_off_every_stop(llm: octavo.LLM) -> None:
    ends = replace(GREEDY, ignore_eos=False, logit_bias={END: 100.0}, max_tokens=12)
    for least in (0, 1, 5, 12):
        answer = llm.generate([PROMPT], replace(ends, min_tokens=least))[0].outputs[0]
        assert len(answer.token_ids) == min(12, least + 1)
        assert answer.finish_reason == ("length" if least == 12 else "stop")
    text = llm.generate([PROMPT], GREEDY)[0].outputs[0].text
    stopped = llm.generate([PROMPT], replace(GREEDY, stop=tuple(set(text)), min_tokens=6))
    assert len(stopped[0].outputs[0].token_ids) in (7, 8, 9)  # characters of several bytes
    assert stopped[0].outputs[0].finish_reason == "stop"


def test_a_stop_string_is_shown_where_that_is_asked(llm: octavo.LLM, served: Served) -> None:
    text = llm.generate([PROMPT], GREEDY)[0].outputs[0].text
    stop = text[4:7]
    for shown in (False, True):
        params = replace(GREEDY, stop=(stop,), include_stop_str=shown)
        expected = text.partition(stop)[0] + stop * shown
        assert by_client(served, params)[1:3] == ("stop", expected)
        assert by_llm(llm, params)[1:3] == ("stop", expected)


def test_special_tokens_are_shown_where_that_is_asked(llm: octavo.LLM) -> None:
    ends = replace(GREEDY, ignore_eos=False, logit_bias={END: 100.0})
    shown = replace(ends, skip_special_tokens=False)
    assert [llm.generate([PROMPT], p)[0].outputs[0].text for p in (ends, shown)] == [
        "", "<|im_end|>",
    ]  # fmt: skip


def test_bad_words_are_not_written(
    llm: octavo.LLM, served: Served, tokenizer: TextTokenizer
) -> None:
    """A word of one token never comes, of several never as those."""
    drawn = llm.generate([PROMPT], GREEDY)[0].outputs[0]
    decode = tokenizer.backend.decode
    pairs = [decode(drawn.token_ids[i : i + 2]) for i in range(len(drawn.token_ids) - 1)]
    words = [word for word in pairs if word.isascii() and word.isprintable() and word.strip()][:3]
    assert words
    ids = [tokenizer.encode_plain(text) for word in words for text in (word, " " + word.lstrip())]
    params = replace(GREEDY, bad_words=tuple(words))
    told = by_llm(llm, params)
    assert told[3] != drawn.token_ids
    assert by_client(served, params) == told
    for word in ids:
        assert not any(told[3][i : i + len(word)] == word for i in range(len(told[3])))


def test_a_seed_draws_the_same_beside_others_of_all_kinds(llm: octavo.LLM) -> None:
    drawn = replace(GREEDY, temperature=1.4, seed=11, frequency_penalty=0.4, logprobs=3)
    others = [replace(GREEDY, **{"temperature": 1.1, "seed": 5, **more}) for more in (
        {}, {"prompt_logprobs": 3}, {"logit_bias": {70: 5.0}}, {"presence_penalty": 2.0},
        {"repetition_penalty": 1.5, "logprobs": 20}, {"bad_words": ("a", "e")},
    )]  # fmt: skip
    alone = llm.generate([PROMPT], drawn)[0].outputs[0]
    for at in (0, 3, 6):
        params = [*others[:at], drawn, *others[at:]]
        among = llm.generate([PROMPT] * 7, params)[at].outputs[0]
        assert among.token_ids == alone.token_ids
        for one, other in zip(among.logprobs, alone.logprobs, strict=True):
            assert one.top_token_ids == other.top_token_ids
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"logprobs": 21}, "logprobs=21: must be from 0 to 20"),
    ({"logprobs": -1}, "logprobs=-1"),
    ({"prompt_logprobs": 2**31}, "prompt_logprobs=2147483648: must be from 0 to 20"),
    ({"presence_penalty": 2.5}, "presence_penalty=2.5: must be from -2.0 to 2.0"),
    ({"presence_penalty": math.nan}, "presence_penalty=nan: must be a finite number"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty=-inf"),
    ({"logit_bias": {5: 101.0}}, r"logit_bias\[5\]=101.0: must be from -100.0 to 100.0"),
    ({"logit_bias": {5: math.nan}}, r"logit_bias\[5\]=nan: must be a finite number"),
    ({"logit_bias": {-5: 1.0}}, "logit_bias.*-5"),
    ({"logit_bias": {2**31: 1.0}}, "logit_bias: token id=2147483648"),
    (
        {"logit_bias": {10**6: 1.0}},
        "logit_bias: token id 1000000: must be below the vocabulary size",
    ),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias: 1025 token ids; the maximum"),
    ({"bad_words": ["x"] * 65}, "bad_words: 65 strings; the maximum is 64"),
    ({"bad_words": [""]}, "bad_words='': must have 1 to 256 characters"),
    ({"bad_words": ["x" * 257]}, "bad_words='x+.*: must have 1 to 256 characters"),
    ({"bad_words": [" "]}, "bad_words=' ': must be"),
    ({"min_tokens": -1}, "min_tokens=-1"),
    ({"min_tokens": 30}, "min_tokens=30: must be at most max_tokens=24"),
]


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_unbounded_n_sampling(
    llm: octavo.LLM, served: Served, wrong: dict[str, Any], words: str
) -> None:
    with Client(served.address) as client, pytest.raises(ClientError, match=words) as caught:
        list(client.generate(PROMPT, **{"max_tokens": 24, **wrong}))
    assert caught.value.code == "INVALID_ARGUMENT"
    with pytest.raises(ValueError, match=words):
        llm.generate(PROMPT, replace(GREEDY, **wrong))
    assert not llm.engine.has_requests


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"logit_bias": [1, 2]}, "logit_bias=.*must be a dict"),
        ({"logit_bias": (3,)}, r"must be a pair \(token id, bias\)"),
        ({"logit_bias": {"5": 1.0}}, "must be an integer"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "duplicate token id"),
        ({"bad_words": [5]}, "bad_words=5"),
        ({"bad_words": ["\ud800"]}, "bad_words=.*must be valid"),
        ({"bad_words": 5}, "bad_words=5: must be a list"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens='no': must be true or false"),
        ({"include_stop_str": None}, "include_stop_str=None"),
        ({"min_tokens": 1.5}, "min_tokens=1.5: must be an integer"),
    ],
)
def test_values_of_other_types_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        octavo.SamplingParams(**wrong)


@pytest.mark.lesson("L30")
def test_proto_defaults_of_these_fields(served: Served) -> None:
    """Absent is the default; zero and false are zero and false."""
    with grpc.insecure_channel(served.address) as channel:
        stub = octavo_pb2_grpc.InferenceStub(channel)
        absent = pb.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        zero = pb.SamplingParams(
            temperature=0, max_tokens=3, ignore_eos=True, logprobs=0, presence_penalty=0,
            frequency_penalty=0, min_tokens=0, include_stop_str=False, skip_special_tokens=False,
        )  # fmt: skip
        replies = [
            list(stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling)))
            for sampling in (absent, zero)
        ]
    ids = [[token for delta in reply for token in delta.token_ids] for reply in replies]
    assert ids[0] == ids[1]
    assert [sum(len(delta.logprobs) for delta in reply) for reply in replies] == [0, 3]
    assert not replies[1][0].logprobs[0].top_token_ids


def test_no_one_pays_for_what_no_one_asks(llm: octavo.LLM) -> None:
    """The message to the workers has none of it, nor has the answer."""
    sent: list[Any] = []
    group = llm.engine.group
    send = group.send
    try:
        group.send = lambda batch, step_id: (sent.append(batch.sampling), send(batch, step_id))[1]  # type: ignore[method-assign]
        llm.generate([PROMPT], replace(GREEDY, temperature=1.0, seed=1))
    finally:
        group.send = send  # type: ignore[method-assign]
    names = ("presence_penalty", "frequency_penalty", "edits", "logprob_places", "prompt_targets")
    assert sent
    assert {getattr(sampling, name) for sampling in sent for name in names} == {None}


def test_two_ranks_tell_the_same(checkpoint: Path, llm: octavo.LLM) -> None:
    """All take part in the logits of a prompt's tokens, in pieces of the same size."""
    asked = {"logprobs": 4, "prompt_logprobs": 3, "logit_bias": {70: 4.0}}
    params = replace(GREEDY, **asked, frequency_penalty=0.7)
    long = [PROMPT * 4, "Short."]
    expected = llm.generate(long, params)
    chunks: dict[str, Any] = {"tensor_parallel_size": 2, "max_num_batched_tokens": 90}
    with octavo.LLM(checkpoint, **{**SETTINGS, **chunks}) as two:
        found = two.generate(long, params)
    assert max(len(out.prompt_token_ids) for out in found) > 90
    for out, other in zip(found, expected, strict=True):
        assert out.outputs[0].token_ids == other.outputs[0].token_ids
        pairs = [*zip(out.prompt_logprobs, other.prompt_logprobs, strict=True)]
        pairs += zip(out.outputs[0].logprobs, other.outputs[0].logprobs, strict=True)
        assert pairs[0] == (None, None)
        for one, another in pairs[1:]:
            assert one is not None and another is not None
            assert one.top_token_ids == another.top_token_ids
            assert one.logprob == pytest.approx(another.logprob, abs=1e-4)
