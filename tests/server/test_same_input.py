"""The same input has the same effect in every API: the same output, or the same error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx2
import pytest

import octavo
from octavo import SamplingParams
from octavo.benchmarks.fakes.tiny_server import Served
from octavo.engine.client.errors import ClientError
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.errors import InputError
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.http_api.server import HttpServer
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 4}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 6}
WHO = {"role": "user", "content": "Who are you?"}
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "content": "A circle.", "tool_call_id": "a"}
PARTS = "must be a string or a list of parts"


@dataclass(frozen=True)
class Given:
    messages: tuple[dict[str, Any], ...] = (WHO,)
    settings: tuple[tuple[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Outcome:
    text: str = ""
    num_prompt_tokens: int = 0
    field: str = ""
    error: str = ""


def given(*messages: dict[str, Any], tools: tuple[Any, ...] = (), **settings: Any) -> Given:
    return Given(messages or (WHO,), tuple((GREEDY | settings).items()), tools)


def answered(content: Any) -> Given:
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    return given(WHO, answer, RESULT, tools=(TOOL,))


SAME = {
    "top_k=-1 is off": (given(top_k=-1, **DRAWN), given(top_k=0, **DRAWN)),
    "seed=-1 is unset": (given(seed=-1), given()),
    "developer is system": (
        given({"role": "developer", "content": "Be short."}, WHO),
        given({"role": "system", "content": "Be short."}, WHO),
    ),
    "calls without content": (answered(None), answered("")),
    "answer without content": (
        given(WHO, {"role": "assistant", "content": None}, WHO),
        given(WHO, {"role": "assistant", "content": ""}, WHO),
    ),
}
REJECTED = {
    "top_k": (given(top_k=-2), "top_k", "top_k=-2: must be from 0 to 2147483647"),
    "temperature": (
        given(temperature=-1.0),
        "temperature",
        "temperature=-1.0: must be from 0.0 to 100.0",
    ),
    "user": (given({"role": "user", "content": None}), "messages[0].content", PARTS),
    "system": (given({"role": "system", "content": None}, WHO), "messages[0].content", PARTS),
    "tool": (
        given(WHO, {"role": "tool", "content": None, "tool_call_id": "a"}),
        "messages[1].content",
        PARTS,
    ),
    "role": (
        given({"role": "robot", "content": "Hi"}),
        "messages[0].role",
        "'robot'; must be one of system, developer, user, assistant, tool",
    ),
    "seed": (given(seed=-2), "seed", "seed=-2: must be from 0 to 9223372036854775807"),
}
NOT_IN_PROTOBUF = ("calls without content", "answer without content", "seed=-1 is unset")
NOT_IN_PROTOBUF += ("user", "system", "tool", "seed")


class Apis(Served):
    """One engine behind all servers, and an `LLM`."""

    async def _start(self) -> None:
        await super()._start()
        self.http = HttpServer("127.0.0.1", 0, None)
        self.url = f"http://{await self.http.start(self.engine, CallTracker())}"
        self.llm = octavo.LLM(EMBEDDED_MODEL, **SETTINGS)

    def close(self) -> None:
        self.llm.close()
        self.run(self.http.drain(1.0))
        super().close()


@pytest.fixture(scope="module")
def apis() -> Iterator[Apis]:
    apis = Apis(EMBEDDED_MODEL, **SETTINGS)
    yield apis
    apis.close()


def by_llm(apis: Apis, asked: Given) -> Outcome:
    try:
        params = SamplingParams(**dict(asked.settings))
        (out,) = apis.llm.chat(list(asked.messages), params, tools=asked.tools or None)
    except InputError as error:
        return Outcome(field=error.field, error=str(error))
    assert out.usage is not None
    return Outcome(out.outputs[0].text, out.usage.prompt_tokens)


def by_async_llm(apis: Apis, asked: Given) -> Outcome:
    async def ask() -> Outcome:
        params = SamplingParams(**dict(asked.settings))
        stream = apis.engine.chat(asked.messages, params, tools=asked.tools or None)
        deltas = [delta async for delta in stream]
        usage = deltas[-1].usage
        return Outcome("".join(delta.text for delta in deltas), usage.prompt_tokens if usage else 0)

    try:
        found: Outcome = apis.run(ask())
    except InputError as error:
        return Outcome(field=error.field, error=str(error))
    return found


def by_client(apis: Apis, asked: Given) -> Outcome:
    with octavo.Client(apis.address) as client:
        try:
            settings = dict(asked.settings)
            reply = client.generate_once(asked.messages, tools=asked.tools or None, **settings)
        except ClientError as error:
            return Outcome(field=_plain(error.field), error=error.text)
    assert reply.usage is not None
    return Outcome(reply.answers[0].text, reply.usage.prompt_tokens)


def by_grpc(apis: Apis, asked: Given) -> Outcome:
    messages = [
        pb.Message(role=each["role"], content=[pb.ContentPart(text=each["content"])])
        for each in asked.messages
    ]
    request = pb.GenerateRequest(
        conversation=pb.Conversation(messages=messages),
        sampling=pb.SamplingParams(**dict(asked.settings)),
    )
    with grpc.insecure_channel(apis.address) as channel:
        deltas = list(octavo_pb2_grpc.InferenceStub(channel).Generate(request, wait_for_ready=True))
    return Outcome("".join(delta.text for delta in deltas), deltas[-1].usage.prompt_tokens)


def by_http(apis: Apis, asked: Given) -> Outcome:
    body = {"messages": asked.messages, **dict(asked.settings)}
    body |= {"tools": asked.tools} if asked.tools else {}
    found = httpx2.post(f"{apis.url}/v1/chat/completions", json=body, timeout=60)
    value = found.json()
    if found.status_code != 200:
        assert found.status_code == 400, value
        return Outcome(field=value["error"]["param"], error=value["error"]["message"])
    text = value["choices"][0]["message"]["content"]
    return Outcome(text or "", value["usage"]["prompt_tokens"])


def _plain(field: str) -> str:
    """Return the field's name outside the protocol."""
    return field.removeprefix("sampling.").removeprefix("conversation.")


Api = Callable[[Apis, Given], Outcome]
IN_PYTHON: tuple[Api, ...] = (by_llm, by_async_llm, by_client, by_http)


@pytest.mark.parametrize("name", SAME)
def test_both_inputs_have_the_same_output(apis: Apis, name: str) -> None:
    one, other = SAME[name]
    wanted = by_llm(apis, other)
    assert not wanted.error and wanted.num_prompt_tokens
    for api in (*IN_PYTHON, *(() if name in NOT_IN_PROTOBUF else (by_grpc,))):
        assert (api(apis, one), api(apis, other)) == (wanted, wanted), api.__name__


@pytest.mark.parametrize("name", REJECTED)
def test_the_error_is_the_same(apis: Apis, name: str) -> None:
    asked, field, text = REJECTED[name]
    text = text if text.startswith(field) else f"{field}: {text}"
    for api in IN_PYTHON:
        assert api(apis, asked) == Outcome(field=field, error=text), api.__name__
    if name not in NOT_IN_PROTOBUF:
        with pytest.raises(grpc.RpcError) as caught:
            by_grpc(apis, asked)
        assert (caught.value.code(), caught.value.details()) == (  # type: ignore[attr-defined]
            grpc.StatusCode.INVALID_ARGUMENT,
            text,
        )
