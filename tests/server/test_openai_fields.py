"""What clients of OpenAI's API send besides the question: names of the model, fields that change no
answer, usage in every chunk."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from openai.types import chat
from openai.types import completion_create_params as completions_params
from openai.types.chat import completion_create_params as chat_params

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.client.requests import conversation_of
from octavo.engine.config.engine_config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.input.conversation import read_conversation
from octavo.engine.replicas.settings import read_settings
from octavo.engine.server.http_api.make_openai_docs import openai_page
from octavo.engine.server.http_api.openai_request import NEUTRAL, read_chat
from octavo.engine.tool_calling.schema import read_tools
from octavo.engine.utils import openai_fields
from octavo.engine.utils.openai_fields import MESSAGE, PART, REQUEST, STREAM_OPTIONS, TABLES
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc
from octavo.scheduler.params import RequestOptions, SamplingParams
from octavo.tests.support.http_served import HttpServed

NAMES = ("org/first", "second")
ASKED = [{"role": "user", "content": "Who are you?"}]
BODY: dict[str, Any] = {"messages": ASKED, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
# Fields that clients add to an answer that they send back, or to any message or part.
ECHOED: dict[str, Any] = {
    "id": "msg_1",
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
    "reasoning": "Let me think.",
    "reasoning_content": "Let me think.",
    "reasoning_details": [{"type": "reasoning.text", "text": "x"}],
    "thinking_blocks": None,
    "provider_specific_fields": {"refusal": None},
    "parsed": {"a": 1},
    "name": "octavo",
    "cache_control": {"type": "ephemeral"},
}
CACHED = {"cache_control": {"type": "ephemeral"}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServed]:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    settings: dict[str, Any] = {"max_model_len": 1024, "kv_cache_memory_bytes": 8_000_000}
    served = HttpServed(checkpoint, dtype="float32", served_model_name=NAMES, **settings)
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture
def raw(served: HttpServed) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, timeout=60) as client:
        yield client


# Names of the model


def test_every_served_name_is_accepted_and_the_first_is_returned(raw: httpx2.Client) -> None:
    assert [each["id"] for each in raw.get("/v1/models").json()["data"]] == list(NAMES)
    for name in NAMES:
        assert raw.get(f"/v1/models/{name}").json()["id"] == name
    for model in ({}, {"model": None}, {"model": ""}, *({"model": name} for name in NAMES)):
        for path, more in (
            ("chat/completions", {"messages": ASKED}),
            ("completions", {"prompt": "a"}),
        ):
            response = raw.post(f"/v1/{path}", json={"max_tokens": 1, **more, **model})
            assert (response.status_code, response.json()["model"]) == (200, NAMES[0]), model
        assert raw.post("/tokenize", json={"prompt": "a", **model}).status_code == 200
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        wrong = raw.post(path, json={"model": "other", "messages": ASKED, "prompt": "a"})
        assert wrong.status_code == 404
        assert all(name in wrong.json()["error"]["message"] for name in NAMES)
    assert raw.get("/v1/models/other").status_code == 404


def test_served_names_over_grpc(served: HttpServed) -> None:
    with grpc.insecure_channel(served.address) as channel:
        info = octavo_pb2_grpc.ControlStub(channel).GetModelInfo(pb.GetModelInfoRequest())
        assert (info.name, list(info.served_names)) == (NAMES[0], list(NAMES))
        stub = octavo_pb2_grpc.InferenceStub(channel)
        for name in ("", *NAMES):
            one = pb.SamplingParams(max_tokens=1)
            stub.GenerateOnce(pb.GenerateRequest(text="a", model=name, sampling=one))
        with pytest.raises(grpc.RpcError) as caught:
            stub.GenerateOnce(pb.GenerateRequest(text="a", model="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND and NAMES[1] in caught.value.details()


def test_served_names_are_checked_before_anything_is_loaded() -> None:
    assert EngineConfig(served_model_name="one").served_model_name == ("one",)
    assert EngineConfig(served_model_name=("a", "b", "a")).served_model_name == ("a", "b")
    for wrong in ("", ("a", ""), (3,), 3, "a\nb"):
        with pytest.raises(ConfigError, match="served_model_name"):
            EngineConfig(served_model_name=wrong)  # type: ignore[arg-type]
    assert read_settings({"served_model_name": '["a", "b"]'}).engine["served_model_name"] == (
        "a",
        "b",
    )


# Fields that change no answer


def test_fields_of_an_echoed_answer_change_nothing(raw: httpx2.Client) -> None:
    answer = {"role": "assistant", "content": "I am."}
    plain = {**BODY, "messages": [*ASKED, answer, *ASKED]}
    parts = [{"type": "text", "text": "Who are you?", "uuid": "u", **CACHED}]
    user = {"role": "user", "content": parts, "name": "bob", **CACHED}
    echoed = {**BODY, "messages": [user, {**answer, **ECHOED}, {**ASKED[0], **CACHED}]}
    one, other = (raw.post("/v1/chat/completions", json=body).json() for body in (plain, echoed))
    assert (
        one["choices"] == other["choices"]
        and one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
    )
    for name in ("audio", "function_call"):  # these do
        wrong = {**BODY, "messages": [*ASKED, {**answer, name: {"id": "x"}}]}
        response = raw.post("/v1/chat/completions", json=wrong)
        assert response.status_code == 400 and name in response.json()["error"]["message"]


def test_every_api_takes_these_fields() -> None:
    messages: list[Any] = [
        {"role": "system", "content": [{"type": "text", "text": "Be kind.", **CACHED}], **CACHED},
        {"role": "user", "content": "Hi", "name": "bob"},
        {"role": "assistant", "content": "Hello", **ECHOED},
        {"role": "user", "content": [{"type": "image", "image": "x", "uuid": "u", **CACHED}]},
    ]
    read = read_conversation(messages)
    assert read.texts == ("Be kind.", "Hi", "Hello") and "uuid" not in read.media[0].part
    assert len(conversation_of([*messages[:3]]).messages) == 3
    from_http: Any = read_chat({"messages": messages[:3]}, NAMES).prompts[0].body
    assert from_http == read_conversation(messages[:3])
    with pytest.raises(octavo.engine.errors.InputError, match="'nome' is unknown"):
        read_conversation([{"role": "user", "content": "x", "nome": "y"}])


def test_marks_of_tools_are_not_shown_to_the_model() -> None:
    function = {"name": "f", "description": "d"}
    tool = {"type": "function", "function": function}
    marked = {"type": "function", "function": {**function, **CACHED}, **CACHED}
    assert read_tools([tool]) == read_tools([marked])


@pytest.mark.parametrize("name", sorted(ECHOED))
def test_each_echoed_field_is_in_the_table(name: str) -> None:
    assert name in {each.name for each in MESSAGE}


# The table


def test_every_field_that_is_read_is_in_the_table_and_the_reverse() -> None:
    table = {each.name: each for each in REQUEST}
    assert len(table) == len(REQUEST)
    own = {each.name for kind in (SamplingParams, RequestOptions) for each in fields(kind)}
    assert own - {"structured"} <= table.keys()
    read_apart = {"model", "messages", "prompt", "stream", "stream_options", "tools", "tool_choice"}
    read_apart |= {"max_completion_tokens", "response_format", "structured_outputs"}
    read_apart |= {"top_logprobs", "parallel_tool_calls"}
    assert {each.name for each in REQUEST if each.is_supported} == read_apart | own - {"structured"}
    assert NEUTRAL.keys() <= table.keys()


def test_every_field_of_openai_s_own_types_is_in_the_table() -> None:
    for params in (chat_params, completions_params):
        hints = typing.get_type_hints(params.CompletionCreateParamsStreaming)
        assert hints.keys() <= {each.name for each in REQUEST}
    names = {each.name for each in MESSAGE}
    for role in ("Assistant", "User", "Tool", "System", "Developer"):
        hints = getattr(chat, f"ChatCompletion{role}MessageParam").__annotations__
        assert hints.keys() <= names, role
    for kind in ("Text", "Image"):
        hints = getattr(chat, f"ChatCompletionContentPart{kind}Param").__annotations__
        assert hints.keys() <= {each.name for each in PART}
    options = chat.ChatCompletionStreamOptionsParam.__annotations__
    assert options.keys() <= {each.name for each in STREAM_OPTIONS}


def test_the_page_is_that_of_the_table() -> None:
    page = Path(__file__).parents[2] / "docs/openai.md"
    command = "python -m octavo.engine.server.http_api.make_openai_docs > docs/openai.md"
    assert page.read_text() == openai_page(), command
    for table in TABLES.values():
        assert all(f"| `{each.name}` |" in openai_page() for each in table)
    assert {"cache_control", "reasoning_content", "refusal"} <= openai_fields.IGNORED_OF_MESSAGE


# Usage in every chunk


def chunks_of(raw: httpx2.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = raw.post(path, json={**body, "stream": True}).text.split("\n\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": ASKED}),
        ("/v1/completions", {"prompt": ["a b c", "d"]}),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_every_chunk_has_the_usage_so_far(
    raw: httpx2.Client, path: str, asked: dict[str, Any], n: int
) -> None:
    body = {**BODY, **asked, "n": n, "temperature": 1, "seed": 3}
    if "prompt" in asked:
        del body["messages"]
    both = {"include_usage": True, "continuous_usage_stats": True}
    *rest, last = chunks_of(raw, path, {**body, "stream_options": both})
    whole = raw.post(path, json=body).json()["usage"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6 * n * len(
        asked.get("prompt", [1])
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in rest]
    assert counts == sorted(counts) and 1 <= counts[0] <= n * len(asked.get("prompt", [1]))
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert rest[-1]["usage"][name] == last["usage"][name] == whole[name]
    for chunk in rest:
        usage = chunk["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    without = chunks_of(raw, path, {**body, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in without[:-1])
    alone = chunks_of(raw, path, {**body, "stream_options": {"continuous_usage_stats": True}})
    assert all(chunk["usage"]["completion_tokens"] and chunk["choices"] for chunk in alone)


def test_usage_in_chunks_counts_each_token_as_it_comes(raw: httpx2.Client) -> None:
    options = {"continuous_usage_stats": True}
    body = {**BODY, "logprobs": True, "stream_options": options}
    chunks = chunks_of(raw, "/v1/chat/completions", body)
    seen = 0
    for chunk in chunks:
        told = chunk["choices"][0]["logprobs"]
        seen += len(told["content"]) if told else 0
        assert chunk["usage"]["completion_tokens"] == seen
    assert seen == 6
