"""The OpenAI-compatible served, as the `openai` package and plain HTTP clients meet it."""

from __future__ import annotations

import asyncio
import base64
import datetime
import functools
import io
import ipaddress
import json
import logging
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sized
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image
from starlette.responses import PlainTextResponse

import octavo
from octavo.benchmarks.demo_model.draw import draw_motion, draw_shape, save_mp4
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import start, wait_for
from octavo.engine.client.errors import ClientError
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.errors import RequestError
from octavo.engine.outputs import OutputDelta
from octavo.engine.server import errors
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.http_api import errors as http_error
from octavo.engine.server.http_api import middleware, openai_stream, snapshot_route
from octavo.engine.server.http_api.openai_request import NEUTRAL, PARAMS, read_chat
from octavo.engine.server.http_api.server import HttpServer
from octavo.engine.tool_calling.schema import TOOL_FIELDS
from octavo.engine.utils.tls import TlsFiles
from octavo.tests.support.http_served import HttpServed

KEYS = ("the-first-key", "the-second-key")
CANVAS = (160, 120)
WHO = [{"role": "user", "content": "Who are you?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
LONG = {"temperature": 0, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
LONG_BODY = {"messages": WHO, "temperature": 0, "max_tokens": 900, "ignore_eos": True}
JSON = {"content-type": "application/json"}
NUM_PLACES = 3  # requests that run or wait


@pytest.fixture(scope="module")
def served() -> Iterator[HttpServed]:
    served = HttpServed(
        EMBEDDED_MODEL,
        KEYS,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=NUM_PLACES - 1,
        max_queue_len=1,
        allowed_media_paths=(),
    )
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture
def client(served: HttpServed) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[1], max_retries=0) as client:
        yield client


@pytest.fixture
def raw(served: HttpServed) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    with httpx2.Client(base_url=served.url, headers=headers, timeout=30) as client:
        yield client


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def star() -> str:
    buffer = io.BytesIO()
    draw_shape(np.random.default_rng(20), CANVAS, "purple", "star").image.save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def ask(question: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def image(**more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": star(), **more}}


def error_in(response: httpx2.Response) -> dict[str, Any]:
    """An error in OpenAI's form, and nothing else."""
    body = response.json()
    assert list(body) == ["error"], body
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return body["error"]


# Answers


def test_streamed_whole_and_grpc_are_the_same(served: HttpServed, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="embedded", messages=WHO, **GREEDY)
    with octavo.Client(served.address) as grpc_client:
        grpc_text = "".join(delta.text for delta in grpc_client.chat(WHO, **GREEDY))
    chunks = list(
        client.chat.completions.create(model="embedded", messages=WHO, stream=True, **GREEDY)
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Octavo" in grpc_text
    assert grpc_text == whole.choices[0].message.content == streamed
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert whole.choices[0].finish_reason == "stop"
    assert len(chunks) > 5 and len({chunk.id for chunk in chunks}) == 1
    assert (whole.object, chunks[0].object) == ("chat.completion", "chat.completion.chunk")
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_when_asked(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="embedded", messages=WHO, **GREEDY)
    *rest, last = client.chat.completions.create(
        model="embedded",
        messages=WHO,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.completion_tokens >= len(rest) > 1  # a slow reader gets joined deltas
    assert last.usage.completion_tokens == whole.usage.completion_tokens > 5
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens > 5
    assert last.usage.prompt_tokens_details.cached_tokens == 16
    assert all(chunk.usage is None for chunk in rest)


def test_an_image_and_a_video_are_seen(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "moving.mp4"
    rng = np.random.default_rng(20)
    save_mp4(path, [each.image for each in draw_motion(rng, CANVAS, "left", 8)])
    video = data_uri(path.read_bytes(), "video/mp4")
    which_way = "Which way does the shape move?"
    for part, question, right in (
        (image(), "What color is the shape?", "purple"),
        (image(detail="low"), "What shape is it?", "star"),
        ({"type": "image_url", "image_url": star()}, "What shape is it?", "star"),
        ({"type": "image", "image": star()}, "What shape is it?", "star"),
        ({"type": "video_url", "video_url": {"url": video}}, which_way, "left"),
        ({"type": "video", "video": video}, which_way, "left"),
    ):  # fmt: skip
        answer = client.chat.completions.create(
            model="embedded", messages=ask(question, part), **GREEDY
        )
        assert answer.choices[0].message.content.strip() == right, part["type"]


def test_options_beside_the_url_count(raw: httpx2.Client) -> None:
    """Inside the object or around it; the answer says what was made of the item."""

    def tokens_of(part: dict[str, Any]) -> int:
        body = {"messages": ask("?", part), "max_tokens": 1}
        media = raw.post("/v1/chat/completions", json=body).json()["media"]
        assert media[0]["kind"] == "image"
        return media[0]["num_tokens"]

    small, least = {"max_pixels": 3136, "min_pixels": 784}, {"min_pixels": 784}
    assert tokens_of(image(**small)) == tokens_of(image() | small) <= 4
    assert tokens_of(image(**least)) > 4
    large = {"resized_height": 560, "resized_width": 560}
    assert tokens_of(image(**large)) == 400
    assert tokens_of(image(detail="low", **large)) == 400


def test_n_answers_and_a_seed(client: openai.OpenAI) -> None:
    wild = {"temperature": 3.0, "max_tokens": 12, "extra_body": {"top_k": 0, "ignore_eos": True}}
    both = client.chat.completions.create(model="embedded", messages=WHO, n=2, seed=7, **wild)
    assert [choice.index for choice in both.choices] == [0, 1]
    alone = [
        client.chat.completions.create(model="embedded", messages=WHO, seed=7 + i, **wild)
        for i in range(2)
    ]
    texts = [choice.message.content for choice in both.choices]
    assert texts == [each.choices[0].message.content for each in alone]
    assert texts[0] != texts[1]
    streamed = ["", ""]
    for chunk in client.chat.completions.create(
        model="embedded", messages=WHO, n=2, seed=7, stream=True, **wild
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_ends_before_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="embedded", messages=WHO, **GREEDY)
    text = whole.choices[0].message.content
    assert " model" in text
    for stop in (" model", ["nowhere", " model"]):
        cut = client.chat.completions.create(model="embedded", messages=WHO, stop=stop, **GREEDY)
        assert cut.choices[0].message.content == text.partition(" model")[0]
        assert cut.choices[0].finish_reason == "stop"


def test_both_names_of_the_longest_answer(client: openai.OpenAI, raw: httpx2.Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model="embedded", messages=WHO, temperature=0, **{name: 3}
        )
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"
    body = {"messages": WHO, "max_tokens": 3, "max_completion_tokens": 4}
    assert "set only one" in error_in(raw.post("/v1/chat/completions", json=body))["message"]


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    """With all that the client's own object has, and OpenAI's newer name for system."""
    first = client.chat.completions.create(model="embedded", messages=WHO, **GREEDY)
    message = first.choices[0].message.model_dump()
    assert None in message.values()
    talk = [{"role": "developer", "content": "Be short."}, *WHO, message, *WHO]
    system = [{"role": "system", "content": "Be short."}, *talk[1:]]
    one, other = (
        client.chat.completions.create(model="embedded", messages=each, **GREEDY)
        for each in (talk, system)
    )
    assert one.choices[0].message.content == other.choices[0].message.content
    assert one.usage.prompt_tokens == other.usage.prompt_tokens > first.usage.prompt_tokens


def test_completions_of_every_form_of_prompt(client: openai.OpenAI, raw: httpx2.Client) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        found = client.completions.create(
            model="embedded", prompt=prompt, temperature=0, max_tokens=8, **more
        )
        assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
        assert found.object == "text_completion"
        return [choice.text for choice in found.choices]

    prompts = ["How many shapes", "What color"]
    ids = [raw.post("/tokenize", json={"prompt": each}).json()["tokens"] for each in prompts]
    alone = [texts(each)[0] for each in prompts]
    assert alone[0] != alone[1]
    assert texts(prompts) == texts(ids) == alone == [texts(each)[0] for each in ids]
    assert texts(prompts, n=2) == [alone[0]] * 2 + [alone[1]] * 2
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="embedded", prompt=prompts, temperature=0, max_tokens=8, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone
    body = {"prompt": "What", "temperature": 0, "ignore_eos": True}
    assert raw.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 16


def test_tokens_and_back(served: HttpServed, raw: httpx2.Client) -> None:
    reader = served.engine.engine.processor.reader
    text = "Who are you? <|im_end|> 東京"
    told = raw.post("/tokenize", json={"prompt": text}).json()
    assert told["tokens"] == reader.tokenizer.encode_marked(text)
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 1024)
    back = raw.post("/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": text}
    full = [told["tokens"][0]] * 1024  # of a prompt and its answer
    assert raw.post("/detokenize", json={"tokens": full}).status_code == 200
    assert raw.post("/detokenize", json={"tokens": [*full, 1]}).status_code == 400
    plain = raw.post("/tokenize", json={"model": "embedded", "messages": WHO}).json()["tokens"]
    assert plain == list(reader.read(WHO).token_ids)
    seen = raw.post("/tokenize", json={"messages": ask("Who are you?", image())}).json()["tokens"]
    assert len(seen) == len(plain) + 3  # begin of an image, its placeholder, end


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").owned_by == "octavo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


# What is refused


def _body(**more: Any) -> dict[str, Any]:
    return {"messages": WHO, "max_tokens": 2, **more}


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "must be a list"),
        ({"messages": []}, "messages", "must be 1 to"),
        ({"messages": ["x"]}, "messages[0]", "must be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a list of parts"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "parts"),
        ({"messages": [{**WHO[0], "nome": "me"}]}, "messages[0]", "'nome' is unknown"),
        ({"messages": [{**WHO[0], "name": 5}]}, "messages[0].name", "must be a string"),
        ({"messages": [{**WHO[0], "function_call": {}}]}, None, "tool_calls"),
        ({"messages": ask("\ud800")}, None, "surrogate"),
        ({"messages": ask("?", {"type": "input_audio"})}, None, "image_url or video_url"),
        ({"messages": ask("?", {"type": ["image"]})}, None, "image_url or video_url"),
        ({"messages": ask("?", {"type": "image_url"})}, None, "must be a URL"),
        ({"messages": ask("?", {"type": "image_url", "image_url": {"url": [1]}})}, None, "URL"),
        ({"messages": ask("?", {"type": "image", "image": [[[1, 2, 3]]]})}, None, "must be a URL"),
        ({"messages": ask("?", {"type": "video", "video": [1]})}, None, "the frames"),
        ({"messages": ask("?", {"type": "image", "path": "/a"})}, None, "'image'; it has 'path'"),
        ({"messages": ask("?", image(detail="huge"))}, None, "auto, low or high"),
        ({"messages": ask("?", image(detail=["low"]))}, None, "auto, low or high"),
        ({"messages": ask("?", image(max_pixel=1))}, None, "'max_pixel' is not an option"),
        ({"messages": ask("?", image(image="x"))}, None, "is not an option"),
        ({"messages": ask("?", image(max_pixels=1 << 20) | {"max_pixels": 1})}, None, "twice"),
        ({"messages": ask("?", image() | {"url": "x"})}, None, "twice"),
        ({"messages": ask("?", image(max_pixels=-1))}, None, "max_pixels"),
        ({"messages": ask("?", image(url="http://a.b/c.png"))}, None, "--allow-media-domains"),
        ({"messages": ask("?", image(url="/etc/passwd"))}, None, "reading files"),
        ({"messages": ask("?", image(url="file:///etc/passwd"))}, None, "reading files"),
        ({"messages": ask("?", image(url="data:image/png;base64,AAAA"))}, None, "supported image"),
        ({"messages": ask("?", image(url=star()[22:]))}, None, "looks like base64"),
        (_body(temperature=-1), "temperature", "temperature=-1"),
        (_body(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
        (_body(logprobs=True, top_logprobs=True), "top_logprobs", "integer"),
        (_body(prompt_logprobs=21), "prompt_logprobs", "to 20"),
        (_body(temperature="hot"), "temperature", "finite number"),
        (_body(top_p=0), "top_p", "use temperature=0"),
        (_body(max_tokens=0), "max_tokens", "from 1"),
        (_body(max_tokens=True), "max_tokens", "an integer"),
        (_body(n=0), "n", "from 1"),
        (_body(n=1000), "n", "to 64"),
        (_body(seed=-2), "seed", "from 0"),
        (_body(stop=[""]), "stop", "characters"),
        (_body(stop={"a": 1}), "stop", "must be a list"),
        (_body(ignore_eos="no"), "ignore_eos", "true or false"),
        (_body(priority=10), "priority", "to 9"),
        (_body(cache_salt=1), "cache_salt", "a string"),
        (_body(timeout_s="soon"), "timeout_s", "finite number"),
        (_body(stream="yes"), "stream", "true or false"),
        (_body(stream_options={"include_usage": True}), "stream_options", "stream=true"),
        (_body(stream=True, stream_options=[]), "stream_options", "an object"),
        (_body(stream=True, stream_options={"include_usage": 1}), "include_usage", "true or false"),
        (_body(stream=True, stream_options={"x": 1}), "stream_options.x", "unknown"),
        (_body(model=3), "model", "must be a string"),
        (_body(tools=[{"type": "function"}]), "tools[0].function", "must be an object"),
        (_body(response_format={"type": "xml"}), "response_format.type", "text, json_object"),
        (_body(modalities=["audio"]), "modalities", "not supported"),
        (_body(best=3), "best", "unknown"),
        (_body(**{"x" * 20_000: 1}), None, "unknown"),
        (_body(seed=10**400), "seed", "seed"),
        ({"messages": ask("x" * 3000), "max_tokens": 1}, "prompt", "max_model_len"),
    ],
)
def test_bad_requests_are_reported_the_field(
    raw: httpx2.Client, body: dict[str, Any], param: str | None, words: str
) -> None:
    # json.dumps, since httpx2 has no half surrogates
    response = raw.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    error = error_in(response)
    assert response.status_code == 400, error
    assert words in error["message"] and len(error["message"]) < 2100
    assert error["type"] == "invalid_request_error"
    assert param in (None, error["param"])


@pytest.mark.lesson("L27")
def test_fields_are_named_as_they_were_written(raw: httpx2.Client) -> None:
    frames = {"type": "video_url", "video_url": {"url": ["/a.png", "/b.png"]}}
    text = {"type": "text", "text": "?"}
    for part, field in (
        (image(url="/a.png"), "messages[0].content[1].image_url.url"),
        ({"type": "image_url", "image_url": "/a.png"}, "messages[0].content[1].image_url"),
        ({"type": "image", "image": "/a.png"}, "messages[0].content[1].image"),
        (frames, "messages[0].content[1].video_url.url[0]"),
    ):
        for stream in (False, True):
            body = {"messages": ask("?", text, part), "stream": stream}
            error = error_in(raw.post("/v1/chat/completions", json=body))
            assert error["param"] == field and error["message"].startswith(f"{field}: ")
    for prompt in ([10**9], [[1], [-1]]):
        error = error_in(raw.post("/v1/completions", json={"prompt": prompt}))
        assert error["param"] == "prompt" and "_ids" not in error["message"]
    error = error_in(raw.post("/v1/completions", json={"prompt": "<|image_pad|>?"}))
    assert error["param"] == "prompt" and "/v1/chat/completions" in error["message"]


def test_null_and_empty_fields_of_messages_are_absent(raw: httpx2.Client) -> None:
    """Clients that dump their own message types send all fields."""
    empty = {"name": None, "tool_calls": [], "tool_call_id": None, "function_call": None}
    empty |= {"refusal": None, "audio": None, "anything": None}
    found = []
    for more in ({}, empty):
        messages = [{"role": "user", "content": "Hi", **more}]
        messages += [{"role": "assistant", "content": "Hello", **more}, *messages]
        body = {"messages": messages, "max_tokens": 4, "temperature": 0}
        answer = raw.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["choices"][0]["message"]["content"])
    assert found[0] == found[1]


@pytest.mark.lesson("L27")
def test_fields_are_named_as_they_were_written_after_admission_too() -> None:
    """A video's later frames are read while it runs."""
    part = {"type": "video_url", "video_url": {"url": "/a.mp4"}}
    conversation: Any = read_chat({"messages": ask("?", part)}, ("embedded",)).prompts[0].body
    assert conversation.media[0].place == "messages[0].content[0].video_url.url"


@pytest.mark.lesson("L27")
def test_what_is_too_long_has_openai_s_code(raw: httpx2.Client) -> None:
    """Programs trim their conversation by it. The bounds are apart: characters, tokens, pixels."""
    large = ask("?", image(resized_height=1120, resized_width=1120))
    for messages in (ask("x" * 1_000_000), ask("x" * 3000), ask("x" * 2000, image()), large):
        response = raw.post("/v1/chat/completions", json={"messages": messages})
        error = error_in(response)
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded"), error
    for stream in (False, True):
        body = {"prompt": [1] * 5000, "stream": stream}
        error = error_in(raw.post("/v1/completions", json=body))
        assert error["code"] == "context_length_exceeded", error


def test_fields_that_ask_for_nothing_pass(raw: httpx2.Client) -> None:
    nothing = {name: values[0] for name, values in NEUTRAL.items() if values}
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s"}
    labels |= {"prompt_cache_key": "k", "prompt_cache_retention": "24h"}
    nulls = dict.fromkeys([*NEUTRAL, *PARAMS, "stream_options", "priority", "model"])
    expected = raw.post("/v1/chat/completions", json={"messages": WHO}).json()["choices"]
    for more in (nothing, labels, nulls):
        response = raw.post("/v1/chat/completions", json={**more, "messages": WHO})
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == expected


def test_log_probabilities_in_openai_s_form(served: HttpServed, raw: httpx2.Client) -> None:
    """Streamed and whole the same; greedy tokens are the likeliest of those told of."""
    body = {**_body(messages=WHO), "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = raw.post("/v1/chat/completions", json=body).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert entries and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    for entry in entries:
        likeliest = entry["top_logprobs"][0]
        assert (entry["token"], entry["logprob"]) == (likeliest["token"], likeliest["logprob"])
        assert entry["logprob"] <= 0
    bare = raw.post("/v1/chat/completions", json={**body, "logprobs": False, "top_logprobs": 0})
    assert bare.json()["choices"][0]["logprobs"] is None
    refused = raw.post("/v1/chat/completions", json={**body, "logprobs": False})
    assert error_in(refused)["param"] == "top_logprobs"


def test_log_probabilities_of_prompts_as_vllm_has_them(
    served: HttpServed, raw: httpx2.Client
) -> None:
    """The second opinion is the library's own, through gRPC."""
    tokenizer = served.engine.engine.processor.tokenizer.backend
    with octavo.Client(served.address) as other:
        reply = other.generate_once(WHO, max_tokens=1, temperature=0, prompt_logprobs=2)
        expected = reply.answers[0].prompt_logprobs
        ids = other.tokenize(WHO)
    chat = _body(messages=WHO, temperature=0, prompt_logprobs=2, n=2)
    found = raw.post("/v1/chat/completions", json=chat).json()
    assert "prompt_logprobs" not in found["choices"][0]
    assert len(found["prompt_logprobs"]) == len(ids) and found["prompt_logprobs"][0] is None
    for entry, told in zip(expected[1:], found["prompt_logprobs"][1:], strict=True):
        assert list(told) == [str(t) for t in dict.fromkeys([entry.token_id, *entry.top])]
        own, likeliest = told[str(entry.token_id)], told[str(entry.top_token_ids[0])]
        assert own["logprob"] == pytest.approx(entry.logprob)
        assert own["decoded_token"] == tokenizer.decode([entry.token_id], skip_special_tokens=False)
        assert likeliest["rank"] == 1
        assert own["rank"] == {t: i + 1 for i, t in enumerate(entry.top)}.get(entry.token_id)
    body = {"prompt": [list(ids), [5, 6]], "n": 2, "max_tokens": 1, "prompt_logprobs": 0}
    choices = raw.post("/v1/completions", json=body).json()["choices"]
    assert [len(each["prompt_logprobs"]) for each in choices] == [len(ids)] * 2 + [2] * 2
    assert list(choices[2]["prompt_logprobs"][1]) == ["6"]
    plain = raw.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).json()
    assert "prompt_logprobs" not in plain["choices"][0] and "prompt_logprobs" not in plain


def test_what_a_server_rejects_by_itself_is_counted_and_logged(
    served: HttpServed, raw: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    stats = served.engine.engine.stats
    before = [stats.errors["INVALID_ARGUMENT"], stats.errors["NOT_FOUND"], stats.ends["refused"]]
    with caplog.at_level(logging.INFO, "octavo.request"):
        for field, value in (("temperature", -1), ("model", "other"), ("messages", 5)):
            headers = {"x-request-id": f"http {field}"}
            raw.post("/v1/chat/completions", json=_body(**{field: value}), headers=headers)
        raw.post("/v1/chat/completions", content=b"{", headers=JSON)
        with octavo.Client(served.address) as other:
            for wrong in ({"temperature": -1.0}, {"images": [b"x"]}):
                with pytest.raises(ClientError):
                    other.generate_once([5], request_id=f"grpc {[*wrong]}", **wrong)
    after = [stats.errors["INVALID_ARGUMENT"], stats.errors["NOT_FOUND"], stats.ends["refused"]]
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 1, 6]
    told = [line for line in caplog.messages if line.startswith("request ")]
    assert len(told) == 6 and all("refused" in line for line in told)
    for name in ("http temperature", "http model", "http messages", "grpc ['temperature']"):
        assert sum(name in line for line in told) == 1


@pytest.mark.parametrize(
    ("content", "status", "text"),
    [
        (b'{"messages": [' + b"[]," * 200_001 + b"[]]}", 413, "too many JSON values"),
        (b'{"prompt": [' + b"5," * 4_000_001 + b"5]}", 413, "too many JSON values"),
        (b'{"messages": [' + b"{}," * 4096 + b"{}]}", 400, "maximum is 4096"),
        (
            b'{"messages": [{"role": "user", "content": [' + b"{}," * (1 << 14) + b"{}]}]}",
            400,
            "16385 parts",
        ),
    ],
    ids=["nested", "values", "messages", "parts"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_many_small_things_are_rejected_before_they_are_gone_through(
    raw: httpx2.Client, path: str, content: bytes, status: int, text: str
) -> None:
    """All requests would wait for that."""
    answer = raw.post(path, content=content, headers=JSON)
    assert (answer.status_code, text in error_in(answer)["message"]) == (status, True)


def test_a_slow_reader_of_several_prompts_holds_their_streams_back() -> None:
    """What a stream has then gathers in it, as one delta."""
    made = [0, 0]

    async def generate(prompt: int, *args: Any, **more: Any) -> AsyncIterator[OutputDelta]:
        for _ in range(100):
            made[prompt] += 1
            yield OutputDelta("it")

    async def read() -> None:
        asked: Any = SimpleNamespace(prompts=[0, 1], params=None, options={})
        engine: Any = SimpleNamespace(generate=generate)
        merged = openai_stream._merged(engine, asked, "name", "", lambda count: None)
        for seen in (1, 5):
            for _ in range(seen):
                await anext(merged)
            for _ in range(50):
                await asyncio.sleep(0)
            assert sum(made) <= 11
        assert sum([1 async for _ in merged]) == 200 - 6

    asyncio.run(read())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_log_probabilities_of_prompts_in_a_stream(raw: httpx2.Client, path: str) -> None:
    """Once a prompt, and the same as of the whole answer."""
    is_chat = "chat" in path
    prompts = ["Who are you, if I may ask?", "And who am I?"]
    asked = {"messages": WHO} if is_chat else {"prompt": prompts}
    body = {**asked, "n": 2, "max_tokens": 3, "prompt_logprobs": 1, "temperature": 0}
    whole = raw.post(path, json=body).json()
    lines = raw.post(path, json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    found = chunks if is_chat else [choice for chunk in chunks for choice in chunk["choices"]]
    expected = [whole] if is_chat else whole["choices"][::2]
    told = [each for each in found if "prompt_logprobs" in each]
    if not is_chat:
        told.sort(key=lambda choice: choice["index"])
        assert [choice["index"] for choice in told] == [0, 2]
    assert len(told) == len(expected)
    for one, other in zip(told, expected, strict=True):
        assert one["prompt_logprobs"][0] is None and other["prompt_logprobs"][0] is None
        for new, old in zip(one["prompt_logprobs"][1:], other["prompt_logprobs"][1:], strict=True):
            for token, entry in new.items():  # beside other rows the last digits may differ
                close = pytest.approx(old[token]["logprob"], abs=1e-3)
                assert entry == {**old[token], "logprob": close}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_we_do_not_have_is_not_ignored(raw: httpx2.Client, name: str) -> None:
    if name in PARAMS or name == "top_logprobs" or name in TOOL_FIELDS:
        pytest.skip("we have it")
    response = raw.post("/v1/chat/completions", json=_body(**{name: {"what": "ever"}}))
    error = error_in(response)
    assert (response.status_code, error["param"]) == (400, name)
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("guided_json", "structured_outputs.json"),
        ("guided_regex", "structured_outputs.regex"),
        ("guided_choice", "structured_outputs.choice"),
        ("guided_grammar", "structured_outputs.grammar"),
        ("include_stop_str_in_output", "include_stop_str"),
    ],
)
def test_names_of_vllm_s_that_have_another_here(raw: httpx2.Client, name: str, here: str) -> None:
    """Who only leaves them out gets another answer than was asked for."""
    error = error_in(raw.post("/v1/chat/completions", json=_body(**{name: True})))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert error["message"].endswith(f"use {here}")


def test_completions_are_checked(raw: httpx2.Client) -> None:
    for prompt in (None, [], [[]], 3, {"a": 1}, [True, 2], [1.5], ["a", 3], [-1], [10**9], ""):
        response = raw.post("/v1/completions", json={"prompt": prompt})
        assert (response.status_code, bool(error_in(response)["param"])) == (400, True), prompt
    response = raw.post("/v1/completions", json={"prompt": ["a"] * 65})
    assert "maximum is 64" in error_in(response)["message"]
    response = raw.post("/v1/completions", json={"prompt": "a", "echo": True})
    assert error_in(response)["param"] == "echo"


@pytest.mark.lesson("L16")
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b'{"a":NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_json_object(raw: httpx2.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        response = raw.post(path, content=body, headers=JSON)
        assert response.status_code == 400
        assert "JSON" in error_in(response)["message"]


@pytest.mark.lesson("L16")
def test_mutated_bodies_are_never_a_fault(raw: httpx2.Client) -> None:
    """Every answer is one, or a refusal that names what is wrong."""
    rng = random.Random(5)
    odd = [None, True, -1, 0.5, "x", [], {}, [1], {"type": "text"}, [[]], "image_url", 1 << 70]
    paths = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")

    def mutate(value: Any) -> Any:
        if rng.random() < 0.12:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {key: mutate(each) for key, each in value.items() if rng.random() < 0.95}
        return [mutate(each) for each in value] if isinstance(value, list) else value

    num_refused = 0
    for _ in range(100):
        body = {
            **_body(messages=ask("?", image(max_pixels=3136)), top_p=1, stop=["x"], stream=False)
        }
        body |= rng.choice(({}, {"prompt": [[1, 2], "a"]}, {"tokens": [1, 2]}, {"prompt": "a"}))
        if rng.random() < 0.5:
            body.pop("messages")
        response = raw.post(rng.choice(paths), json=mutate(body))
        assert response.status_code in (200, 400), response.text
        num_refused += response.status_code == 400
        assert response.status_code == 200 or error_in(response)["message"]
    assert 25 < num_refused < 100


@pytest.mark.lesson("L28")
def test_key_timing_every_path_needs_a_key(served: HttpServed) -> None:
    with httpx2.Client(base_url=served.url) as nobody:
        for path in (
            "/v1/models",
            "/v1/chat/completions",
            "/tokenize",
            "/no/such",
            "/engine/snapshot",
        ):
            for method in ("GET", "POST"):
                for header in ("", "Bearer", "Bearer x", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x"):
                    headers = {"authorization": header} if header else {}
                    response = nobody.request(method, path, headers=headers)
                    assert response.status_code == 401
                    assert error_in(response)["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
        assert nobody.get("/metrics").status_code == 401
        assert nobody.get("/health").status_code == nobody.get("/ready").status_code == 200
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        assert nobody.get("/v1/models", headers=headers).status_code == 200
        metrics = nobody.get("/metrics", headers=headers)
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "octavo_requests_running" in metrics.text
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as wrong,
    ):
        wrong.models.list()


def test_paths_methods_and_models_that_are_not(client: openai.OpenAI, raw: httpx2.Client) -> None:
    there = "use one of /v1/chat/completions, /v1/completions, /v1/models"
    for method, path, status, words in (
        ("GET", "/no/such", 404, there),
        ("POST", "/v1/embeddings", 404, there),
        ("POST", "/v1/responses", 404, there),
        ("POST", "/chat/completions", 404, "use /v1/chat/completions; base_url of OpenAI's"),
        ("GET", "/models", 404, "use /v1/models; base_url"),
        ("POST", "/v1/tokenize", 404, "use /tokenize"),
        ("GET", "/v1/chat/completions", 405, "use POST, not 'GET'"),
        ("POST", "/v1/models", 405, "not 'POST'"),
    ):
        response = raw.request(method, path, **({"json": {}} if method == "POST" else {}))
        assert response.status_code == status
        message = error_in(response)["message"]
        assert f"'{path}'" in message and words in message, message
        assert ("allow" in response.headers) == (status == 405)
    with pytest.raises(openai.NotFoundError, match="another") as refused:
        client.chat.completions.create(model="another", messages=WHO)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_other_pages_of_a_browser_cannot_ask(raw: httpx2.Client) -> None:
    """What a browser sends without asking first is not taken, and nobody else is invited."""
    response = raw.post(
        "/v1/completions", content=b'{"prompt":"x"}', headers={"origin": "http://x"}
    )
    assert response.status_code == 415 and "application/json" in error_in(response)["message"]
    asked = {"origin": "http://x", "access-control-request-method": "POST"}
    for response in (raw.get("/v1/models", headers={"origin": "http://x"}),
                     raw.options("/v1/completions", headers=asked)):  # fmt: skip
        assert not any(name.startswith("access-control") for name in response.headers)


def test_a_body_that_is_too_large(raw: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 100_000)
    body = json.dumps(_body(user="x" * 100_000)).encode()
    pieces = (body[at : at + 1000] for at in range(0, len(body), 1000))  # sent chunked
    for content in (body, pieces):
        response = raw.post("/v1/chat/completions", content=content, headers=JSON)
        assert response.status_code == 413
        assert error_in(response)["code"] == "request_too_large"
    small = json.dumps(_body(user="x" * 90_000)).encode()
    assert raw.post("/v1/chat/completions", content=small, headers=JSON).status_code == 200


def test_bodies_that_are_here_are_bounded_together() -> None:
    """Whole or not: one client could send as many of 256 MiB as it likes. One alone may be more."""
    nobody: Any = None
    guard = middleware.AuthMiddleware(
        PlainTextResponse("let through"), CallTracker(), nobody, nobody, 1000
    )

    async def post(chunks: asyncio.Queue[bytes]) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            if sent:
                await asyncio.Event().wait()
            chunk = await chunks.get()
            return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/tokenize", "headers": headers}
        await guard({**scope, "server": ("127.0.0.1", 8000)}, receive, send)
        return sent[0]["status"]

    async def run() -> list[int]:
        first: asyncio.Queue[bytes] = asyncio.Queue()
        first.put_nowait(b"a" * 1500)
        slow = asyncio.create_task(post(first))
        await asyncio.sleep(0.01)
        others: list[asyncio.Queue[bytes]] = [asyncio.Queue(), asyncio.Queue()]
        for each in others:
            each.put_nowait(b"a" * 10)
            each.put_nowait(b"")
        refused = await post(others[0])
        first.put_nowait(b"")
        return [refused, await slow, await post(others[1])]

    assert asyncio.run(run()) == [429, 200, 200]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("a.localhost:1", 200),
        ("evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("[::1", 421),
    ],
)
def test_a_page_whose_name_was_made_to_lead_here_is_rejected(host: str, status: int) -> None:
    """DNS rebinding: a browser of this machine takes the server for that site's own. Not where keys
    are asked for, nor at an address that others reach."""
    refusals: Any = None  # of keys: there are none
    for server, keys, expected in [
        ("127.0.0.1", None, status),
        ("::1", None, status),
        ("192.0.2.7", None, 200),
        ("127.0.0.1", ApiKeys(KEYS), 200),
    ]:
        guard = middleware.AuthMiddleware(
            PlainTextResponse("let through"), CallTracker(), keys, refusals
        )
        headers = {"host": host, "authorization": f"Bearer {KEYS[0]}"}
        answer = asyncio.run(_get(guard, server, headers))
        assert answer["status"] == expected, (server, answer)


async def _get(app: Any, server: str, headers: dict[str, str]) -> Any:
    """The beginning of the answer to a request for the list of models."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": raw_headers}
    await app({**scope, "server": (server, 8000)}, None, send)
    return sent[0]


@pytest.mark.lesson("L31")
def test_message_size(raw: httpx2.Client) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    part = image(url=data_uri(buffer.getvalue(), "image/bmp"), max_pixels=50176)
    response = raw.post("/v1/chat/completions", json=_body(messages=ask("?", part)))
    assert len(response.request.content) > 10_000_000
    assert response.status_code == 200, response.text


def test_a_full_queue_is_reported_to_come_again(served: HttpServed, client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    streams = [
        create(model="embedded", messages=WHO, stream=True, **LONG) for _ in range(NUM_PLACES - 1)
    ]
    waiting = threading.Thread(
        target=lambda: create(model="embedded", messages=WHO, max_tokens=1), daemon=True
    )
    waiting.start()
    wait_for(lambda: len(served.engine._streams) == NUM_PLACES)
    for stream in (True, False):
        with pytest.raises(openai.RateLimitError) as refused:
            create(model="embedded", messages=WHO, stream=stream)
        assert refused.value.code == "rate_limit_exceeded"
        assert int(refused.value.response.headers["retry-after"]) > 0
    for each in streams:
        each.close()
    waiting.join(30)
    served.wait_empty()
    create(model="embedded", messages=WHO, max_tokens=1)


def test_time_that_runs_out(served: HttpServed, client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    for stream in (True, False):
        with pytest.raises(openai.InternalServerError) as late:
            create(model="embedded", messages=WHO, stream=stream, extra_body={"timeout_s": 0.0})
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        ends = served.engine.engine.stats.errors["DEADLINE_EXCEEDED"]
        with pytest.raises(openai.InternalServerError):  # by its defaults it sends a 5xx again
            client.with_options(max_retries=2).chat.completions.create(
                model="embedded", messages=WHO, stream=stream, extra_body={"timeout_s": 0.0}
            )
        assert served.engine.engine.stats.errors["DEADLINE_EXCEEDED"] == ends + 1
    more = {**LONG, "extra_body": {"ignore_eos": True, "timeout_s": 0.3}}
    texts = []
    with pytest.raises(openai.APIError) as cut:  # an event of a stream that had begun
        for chunk in create(model="embedded", messages=WHO, stream=True, **more):
            texts.append(chunk.choices[0].delta.content)
    assert cut.value.code == "deadline_exceeded"
    assert len(texts) > 1


def test_a_fault_of_ours_tells_nothing(
    served: HttpServed, raw: httpx2.Client, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    async def fail(*given: Any, **named: Any) -> Any:
        if fail.first:  # type: ignore[attr-defined]
            yield octavo.engine.outputs.OutputDelta("x", text="a")  # type: ignore[attr-defined]
        raise RuntimeError("the secret path /etc/x")

    monkeypatch.setattr(served.engine, "generate", fail)
    for stream, first in ((True, True), (True, False), (False, False)):
        fail.first = first  # type: ignore[attr-defined]
        response = raw.post("/v1/chat/completions", json=_body(stream=stream))
        assert "secret" not in response.text and "server_error" in response.text
        assert response.status_code == (200 if first else 500)
        wait_for(lambda: "the secret path" in caplog.text)
        caplog.clear()


@pytest.mark.parametrize(("code", "times"), [("INTERNAL", 1), ("UNAVAILABLE", 3)])
def test_openai_s_client_sends_again_what_may_be(
    served: HttpServed,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    times: int,
) -> None:
    """What has brought the workers down is not to do so thrice."""
    came: list[str] = []

    async def fail(*given: Any, **named: Any) -> Any:
        came.append(code)
        yield OutputDelta("x", finish_reason="error", failure=RequestError(code, "it failed"))

    monkeypatch.setattr(served.engine, "generate", fail)
    monkeypatch.setattr(http_error, "RETRY_AFTER", "0.01")
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=2).chat.completions.create(model="embedded", messages=WHO)
    assert len(came) == times


# Lives of requests


def has_length(value: Sized, length: int) -> bool:
    return len(value) == length


def test_a_client_that_leaves_frees_its_request(served: HttpServed, raw: httpx2.Client) -> None:
    aborted: list[str] = []
    abort = served.engine._steps.abort
    served.engine._steps.abort = lambda key: (aborted.append(key), abort(key))[1]  # type: ignore
    try:
        with raw.stream(
            "POST", "/v1/chat/completions", json={**LONG_BODY, "stream": True}
        ) as lines:
            next(lines.iter_lines())
        served.wait_empty()
        assert len(aborted) == 1
        host, port = served.url.removeprefix("http://").split(":")
        for body in (LONG_BODY, {"prompt": ["a", "b"], "max_tokens": 900, "ignore_eos": True}):
            path = "chat/completions" if "messages" in body else "completions"
            content = json.dumps(body)
            with socket.create_connection((host, int(port))) as wire:
                head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[1]}\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                wire.sendall((head + content).encode())
                requests = served.engine.engine.requests
                wait_for(functools.partial(has_length, requests, len(body.get("prompt", "1"))))
            served.wait_empty()
        assert len(aborted) == 4
    finally:
        served.engine._steps.abort = abort


def test_the_request_has_a_name(served: HttpServed, client: openai.OpenAI) -> None:
    named = {"extra_headers": {"x-request-id": "mine"}}
    stream = client.chat.completions.create(
        model="embedded", messages=WHO, stream=True, **LONG, **named
    )
    first = next(iter(stream))
    assert first.id == "chatcmpl-mine"
    assert stream.response.headers["x-request-id"] == "mine"
    for prompt in ("one", ["one", "two"]):  # a mesh's trace id: no conflict
        also = client.completions.create(model="embedded", prompt=prompt, max_tokens=2, **named)
        assert also.id.startswith("cmpl-mine-") and also._request_id == "mine"
    with octavo.Client(served.address) as other:
        assert other.abort("mine")
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "abort"
    answer = client.chat.completions.create(model="embedded", messages=WHO, **GREEDY, **named)
    assert answer._request_id == "mine"
    with pytest.raises(openai.BadRequestError, match="x-request-id"):
        client.chat.completions.create(
            model="embedded", messages=WHO, extra_headers={"x-request-id": "x" * 300}
        )


def test_a_grpc_client_at_the_http_port_is_reported(served: HttpServed, tmp_path: Path) -> None:
    address = served.url.removeprefix("http://")
    with octavo.Client(address) as lost, pytest.raises(ClientError, match="gRPC port") as told:
        list(lost.chat(WHO))
    assert told.value.code == "UNAVAILABLE" and "http1.x" not in told.value.text
    with octavo.Client(address) as lost, pytest.raises(ClientError, match="grpc="):
        lost.load()


def test_every_answer_has_its_request_s_name(served: HttpServed, raw: httpx2.Client) -> None:
    named = {"x-request-id": "mine"}
    for path, more, status in (
        ("/v1/models", {}, 200),
        ("/health", {}, 200),
        ("/no/such", {}, 404),
        ("/v1/models", {"authorization": "Bearer wrong-key"}, 401),
    ):
        response = raw.get(path, headers={**named, **more})
        assert (response.status_code, response.headers["x-request-id"]) == (status, "mine")
    refused = raw.post("/v1/chat/completions", json={}, headers=named)
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine")
    assert "x-request-id" not in raw.get("/v1/models").headers


def test_the_caller_s_trace_is_the_request_s(
    served: HttpServed, raw: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """As over gRPC; one that is not valid is passed over."""
    caplog.set_level(logging.INFO, "octavo.server")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    parents: list[str] = []
    spans = SimpleNamespace(write=lambda parent, *rest: parents.append(parent))
    served.engine.spans = spans  # type: ignore[assignment]
    try:
        body = {"max_tokens": 2, "prompt": "x"}
        for given, more in ((trace, {}), (trace, {"stream": True}), ("00-junk", {})):
            raw.post("/v1/completions", json={**body, **more}, headers={"traceparent": given})
        headers = {"traceparent": trace}
        raw.post("/v1/completions", json={**body, "prompt": ["x", "y"]}, headers=headers)
        wait_for(lambda: len(parents) == 5)
    finally:
        served.engine.spans = None
    assert parents == [trace, trace, "", trace, trace]
    assert caplog.text.count(trace) == 3 and "junk" not in caplog.text


def test_many_clients_at_once(served: HttpServed, client: openai.OpenAI) -> None:
    def talk() -> None:
        for chunk in client.chat.completions.create(
            model="embedded", messages=WHO, stream=True, **GREEDY
        ):
            texts[threading.get_ident()] = texts.get(threading.get_ident(), "") + (
                chunk.choices[0].delta.content or ""
            )

    texts: dict[int, str] = {}
    threads = [threading.Thread(target=talk) for _ in range(NUM_PLACES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(texts) == NUM_PLACES and len(set(texts.values())) == 1


def certificate(folder: Path) -> TlsFiles:
    """A new pair that signs itself, over the former one's files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(days=1))
    made = made.not_valid_after(now + datetime.timedelta(days=1))
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    files = TlsFiles(folder / "cert.pem", folder / "key.pem")
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files.cert.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    files.key.write_bytes(key.private_bytes(pem, *plain))
    return files


def test_tls_is_for_both_servers_and_is_reloaded(served: HttpServed, tmp_path: Path) -> None:
    files = certificate(tmp_path)
    server = HttpServer("127.0.0.1", 0, None, files)
    url = f"https://{served.run(server.start(served.engine, CallTracker()))}"

    def asks() -> int:
        context = ssl.create_default_context(cafile=str(files.cert))
        return httpx2.get(f"{url}/ready", verify=context).status_code

    assert asks() == 200
    old = ssl.create_default_context(cafile=str(files.cert))
    certificate(tmp_path)
    assert asks() == 200
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/ready", verify=old)
    new = ssl.create_default_context(cafile=str(files.cert))
    files.key.write_text("torn")
    assert httpx2.get(f"{url}/ready", verify=new).status_code == 200
    with pytest.raises(httpx2.HTTPError):
        httpx2.get(url.replace("https", "http") + "/ready")
    served.run(server.drain(1.0))
    certificate(tmp_path)  # mutual: who brings no certificate is nobody
    server = HttpServer("127.0.0.1", 0, None, TlsFiles(files.cert, files.key, files.cert))
    url = f"https://{served.run(server.start(served.engine, CallTracker()))}"
    with pytest.raises(httpx2.HTTPError):
        asks()
    context = ssl.create_default_context(cafile=str(files.cert))
    context.load_cert_chain(files.cert, files.key)
    assert httpx2.get(f"{url}/ready", verify=context).status_code == 200
    served.run(server.drain(1.0))


# The process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_sigterm_lets_running_requests_finish(checkpoint: Path) -> None:
    """New ones are refused meanwhile, on connections old and new."""
    server = start(checkpoint, "--http-port", "0")
    url = f"http://{server.http_address}"
    with httpx2.Client(base_url=url, timeout=30) as raw:
        assert raw.get("/v1/models").json()["data"][0]["id"] == checkpoint.name
        assert raw.get("/ready").status_code == 200
        body = {**LONG_BODY, "stream": True, "max_tokens": 500}  # well within the grace
        with raw.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx2.get(f"{url}/ready").status_code == 503)
            assert raw.get("/ready").json()["error"]["code"] == "unavailable"
            refused = raw.post("/v1/chat/completions", json=_body())
            assert (refused.status_code, error_in(refused)["code"]) == (503, "unavailable")
            assert refused.headers["retry-after"]
            assert raw.get("/health").status_code == raw.get("/v1/models").status_code == 200
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(30) == 0, server.text()
    assert "Traceback" not in server.text()


def test_requests_that_outlive_the_grace_are_reported(checkpoint: Path) -> None:
    """By each served in its own form: a stream, a whole answer and a page that looks."""
    code = (
        "from octavo.engine.server.grpc_api import server as grpc_server\n"
        "from octavo.engine.cli.main import main\n"
        "grpc_server.GRACE = 0.3\nmain()"
    )
    options = ("serve", "--model", str(checkpoint), "--port", "0", "--http-port", "0")
    command = [sys.executable, "-P", "-c", code, *options, "--max-model-len", "16384"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert server.stdout is not None
    told = dict(word.split("=") for word in server.stdout.readline().split()[1:])
    body = {**LONG_BODY, "max_tokens": 16000}
    found: dict[str, Any] = {}

    def whole() -> None:
        url = f"http://{told['http']}/v1/chat/completions"
        found["whole"] = httpx2.post(url, json=body, timeout=30)

    def stream() -> None:
        url = f"http://{told['http']}/v1/chat/completions"
        found["stream"] = httpx2.post(url, json={**body, "stream": True}, timeout=30).text

    def grpc_stream() -> None:
        with octavo.Client(told["grpc"]) as client:
            try:
                list(client.generate([5, 6], max_tokens=16000, ignore_eos=True))
            except ClientError as error:
                found["grpc"] = error

    threads = [threading.Thread(target=each) for each in (whole, stream, grpc_stream)]
    for thread in threads:
        thread.start()
    with octavo.Client(told["grpc"]) as client:
        wait_for(lambda: client.load().num_running == 3)
    server.send_signal(signal.SIGTERM)
    log = server.communicate(timeout=30)[1]
    for thread in threads:
        thread.join(30)
    assert server.returncode == 0 and "Traceback" not in log and "Exception" not in log, log
    assert found["whole"].status_code == 503
    assert error_in(found["whole"])["message"] == errors.CLOSED.message
    last = json.loads(found["stream"].strip().split("\n\n")[-1].removeprefix("data: "))
    assert (last["error"]["code"], last["error"]["message"]) == (
        "unavailable",
        errors.CLOSED.message,
    )
    assert (found["grpc"].code, found["grpc"].text) == ("UNAVAILABLE", errors.CLOSED.message)
    assert found["grpc"].retryable


def test_workers_that_are_away_for_long_are_reported(
    served: HttpServed, raw: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests wait for them; who balances load is to ask another server."""
    assert raw.get("/ready").status_code == 200
    monkeypatch.setattr(served.engine.engine.restarts, "_away_since", time.monotonic() - 60)
    assert raw.get("/ready").status_code == 503
    monkeypatch.setattr(snapshot_route, "SNAPSHOT_TIMEOUT", 0.05)
    monkeypatch.setattr(served.engine._steps, "look", Future)
    time.sleep(snapshot_route.MIN_AGE)
    answer = raw.get("/engine/snapshot")
    assert (answer.status_code, error_in(answer)["code"]) == (503, "unavailable")


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{**WHO[0], "name": "bob"}]},
        {"top_k": -1, "length_penalty": 1.0, "chat_template_kwargs": {}},
    ],
)
def test_what_frameworks_send_of_habit(raw: httpx2.Client, more: dict[str, Any]) -> None:
    body = _body(messages=WHO, temperature=0)
    found = [raw.post("/v1/chat/completions", json={**body, **each}).json() for each in ({}, more)]
    assert found[0]["choices"] == found[1]["choices"]


def test_workers_that_are_gone_are_503(checkpoint: Path) -> None:
    server = start(checkpoint, "--http-port", "0", "--max-restarts", "0")
    with openai.OpenAI(base_url=f"http://{server.http_address}/v1", api_key="any") as client:
        stream = iter(
            client.chat.completions.create(model=checkpoint.name, messages=WHO, stream=True, **LONG)
        )
        next(stream)
        os.kill(server.worker_pids[0], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine has stopped") as gone:
            list(stream)
    assert gone.value.code == "unavailable"
    assert server.process.wait(30) == 1


def test_a_server_that_cannot_open_says_why() -> None:
    """(A port in use: media/test_settings.py.)"""
    block = "import sys; sys.modules['{}'] = None\nfrom octavo.engine.cli.main import main\nmain()"
    words = "pip install octavo[http]"
    for module in ("starlette", "uvicorn"):
        command = [sys.executable, "-P", "-c", block.format(module)]
        more = ["serve", "--port", "0", "--http-port", "0"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
