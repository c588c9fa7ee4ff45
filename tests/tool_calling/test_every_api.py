"""Tool calls through every served: asked for, streamed, answered, and refused with the field.

No checkpoint here calls tools by itself. So the text of an answer is planted, at one place: where
tokens become text. The tokens, the steps and all that comes after are real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx2
import openai
import pytest

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.client.errors import ClientError
from octavo.engine.core import active_requests
from octavo.engine.core.detokenizer import TextStream
from octavo.engine.errors import InputError
from octavo.engine.outputs import OutputDelta
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc
from octavo.tests.support.http_served import HttpServed

PER_TOKEN = 5  # characters of the planted text
ASKED = [{"role": "user", "content": "Is it warm in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
ARGUMENTS = {"place": "Oslo", "deep": {"a": [{}, "</tool_call>"]}}
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 200}
PARAMS = octavo.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


class Planted(TextStream):
    """Text that a test wrote, a few characters a token; its end stops the answer."""

    text = ""

    def push(self, token_ids: Sequence[int]) -> str:
        begin = PER_TOKEN * len(self._token_ids)
        self._token_ids.extend(token_ids)
        end = PER_TOKEN * len(self._token_ids)
        self.stopped = end >= len(self.text)
        return self.text[begin:end]

    def flush(self) -> str:
        return ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[HttpServed]:
    settings: dict[str, Any] = {"max_model_len": 2048, "kv_cache_memory_bytes": 8_000_000}
    served = HttpServed(checkpoint, dtype="float32", **settings)
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture
def client(served: HttpServed) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> type[Planted]:
    monkeypatch.setattr(active_requests, "TextStream", Planted)
    monkeypatch.setattr(Planted, "text", f"I look.\n{CALL}")
    return Planted


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        **{"messages": ASKED, "tools": [WEATHER], "extra_body": {"ignore_eos": True}}
        | GREEDY
        | more,
    )


def test_a_round_trip_of_openai_s_client(client: openai.OpenAI, planted: type[Planted]) -> None:
    (choice,) = chat(client).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == ARGUMENTS
    planted.text = "It is warm."
    result = {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}
    answer = chat(client, messages=[*ASKED, choice.message.model_dump(), result])
    assert answer.choices[0].message.content == "It is warm."
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"


def test_streamed_calls_come_whole_with_their_index(
    client: openai.OpenAI, planted: type[Planted]
) -> None:
    planted.text = f"I look.\n{CALL}\n{CALL}<tool_call>{{bad</tool_call> done"
    content: dict[int, str] = {0: "", 1: ""}
    calls: dict[int, list[Any]] = {0: [], 1: []}
    reasons = {}
    for chunk in chat(client, stream=True, n=2):
        for choice in chunk.choices:
            content[choice.index] += choice.delta.content or ""
            calls[choice.index].extend(choice.delta.tool_calls or [])
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert reasons == {0: "tool_calls", 1: "tool_calls"}
    for index in (0, 1):
        assert content[index] == "I look.<tool_call>{bad</tool_call> done"
        assert [call.index for call in calls[index]] == [0, 1]
        assert [json.loads(call.function.arguments) for call in calls[index]] == [ARGUMENTS] * 2
    every = [call.id for each in calls.values() for call in each]
    assert len(set(every)) == 4 and all(each.startswith("call_") for each in every)


def test_a_call_that_max_tokens_cut_off_is_text(
    client: openai.OpenAI, planted: type[Planted]
) -> None:
    (choice,) = chat(client, max_tokens=8).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert choice.message.content == planted.text[: 8 * PER_TOKEN]


def test_without_tools_the_text_is_text(client: openai.OpenAI, planted: type[Planted]) -> None:
    for more in ({"tools": openai.omit}, {"tool_choice": "none"}):
        (choice,) = chat(client, **more).choices
        assert choice.message.content == planted.text and choice.finish_reason == "stop"


def test_no_parallel_calls_is_one_call(client: openai.OpenAI, planted: type[Planted]) -> None:
    planted.text = f"{CALL}\n{CALL}"
    (choice,) = chat(client, parallel_tool_calls=False).choices
    assert len(choice.message.tool_calls) == 1 and choice.message.content is None


def test_the_prompt_has_the_tools_unless_none_are_to_be_called(
    client: openai.OpenAI, planted: type[Planted]
) -> None:
    def size(**more: Any) -> int:
        return chat(client, **more).usage.prompt_tokens

    assert size() > size(tool_choice="none") == size(tools=openai.omit)


def test_a_choice_is_kept_to_by_a_model_that_was_never_reported_how(client: openai.OpenAI) -> None:
    """Nothing is planted here: the tiny checkpoint's weights are random."""
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
    function = {"name": "tell", "parameters": {**schema, "additionalProperties": False}}
    tools = [WEATHER, {"type": "function", "function": function}]
    for stream in (False, True):
        more = {"tools": tools, "tool_choice": _named("tell"), "stream": stream, "extra_body": {}}
        answer = chat(client, **more, temperature=1, seed=3)
        if stream:
            calls = [c for chunk in answer for c in chunk.choices[0].delta.tool_calls or ()]
        else:
            (choice,) = answer.choices
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
            calls = choice.message.tool_calls
        assert [call.function.name for call in calls] == ["tell"]
        assert json.loads(calls[0].function.arguments).keys() == {"warm"}


def test_a_forced_call_that_max_tokens_cut_is_a_call(
    served: HttpServed, client: openai.OpenAI
) -> None:
    """By every API, wherever it is cut. Nothing is planted here either."""
    function = {"name": "tell", "parameters": {"properties": {"warm": {"enum": ["yes", "</a>"]}}}}
    function["parameters"]["required"] = ["warm"]  # type: ignore[index]
    tools = [WEATHER, {"type": "function", "function": function}]
    more = {"tools": tools, "tool_choice": _named("tell"), "extra_body": {}, "seed": 3}
    whole = chat(client, **more)
    (call,) = whole.choices[0].message.tool_calls
    settings: dict[str, Any] = {"temperature": 0, "seed": 3}
    with octavo.Client(served.address) as other:
        for size in range(1, whole.usage.completion_tokens):
            is_last = size > whole.usage.completion_tokens - 5  # where the closing tag is cut
            if size % 3 and not is_last:
                continue
            (choice,) = chat(client, **more, max_tokens=size).choices
            assert choice.finish_reason == "length" and choice.message.content is None
            (cut,) = choice.message.tool_calls
            assert cut.function.name == "tell"
            assert call.function.arguments.startswith(cut.function.arguments)
            chunks = list(chat(client, **more, max_tokens=size, stream=True))
            (streamed,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
            assert streamed.function.arguments == cut.function.arguments
            assert chunks[-1].choices[0].finish_reason == "length"
            own: dict[str, Any] = {"tools": tools, "tool_choice": _named("tell"), **settings}
            answer = other.generate_once(ASKED, **own, max_tokens=size).answers[0]
            (theirs,) = answer.tool_calls
            assert (theirs.arguments, answer.text) == (cut.function.arguments, "")
            assert answer.finish_reason == "length"
    assert cut.function.arguments == call.function.arguments  # only the closing tag was cut


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


BAD = [
    ({"tools": [WEATHER, {"type": "function", "function": {}}]}, "tools[1].function.name"),
    ({"tools": [WEATHER] * 200}, "tools"),
    ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": _named("news")}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "a", "parameters": {"not": {"const": 1}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    (
        {
            "tools": [WEATHER],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "tool_choice",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]},
        "messages[0].tool_calls[0].function.name",
    ),
    ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0].content"),
]


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(("body", "field"), BAD)
def test_http_names_the_field(served: HttpServed, body: dict[str, Any], field: str) -> None:
    whole = {"messages": ASKED, **body}
    answer = httpx2.post(f"{served.url}/v1/chat/completions", json=whole, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "body",
    [{"tools": 1}, {"tools": [[]]}, {"tool_choice": []}, {"parallel_tool_calls": "no"}],
)
def test_http_takes_no_nonsense(served: HttpServed, body: dict[str, Any]) -> None:
    whole = {"messages": ASKED, **body}
    answer = httpx2.post(f"{served.url}/v1/chat/completions", json=whole, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(body)))


def _message(role: str, text: str = "", **more: Any) -> pb.Message:
    return pb.Message(role=role, content=[pb.ContentPart(text=text)], **more)


def _request(*messages: pb.Message, **more: Any) -> pb.GenerateRequest:
    function = WEATHER["function"] | {"parameters": json.dumps(WEATHER["function"]["parameters"])}
    sampling = pb.SamplingParams(**GREEDY, ignore_eos=True)
    conversation = pb.Conversation(messages=messages or (_message("user", "Warm?"),))
    given = {"tools": [pb.Tool(function=pb.Function(**function))]} | more
    return pb.GenerateRequest(conversation=conversation, sampling=sampling, **given)


@pytest.fixture
def stub(served: HttpServed) -> Iterator[octavo_pb2_grpc.InferenceStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield octavo_pb2_grpc.InferenceStub(channel)


def test_a_round_trip_of_grpc(stub: octavo_pb2_grpc.InferenceStub, planted: type[Planted]) -> None:
    deltas = list(stub.Generate(_request()))
    (call,) = [call for delta in deltas for call in delta.tool_calls]
    assert "".join(delta.text for delta in deltas) == "I look."
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert deltas[-1].finish_reason == pb.FINISH_REASON_STOP
    once = stub.GenerateOnce(_request()).answers[0]
    assert once.text == "I look." and once.tool_calls[0].function == call.function
    planted.text = "Warm."
    told = [_message("user", "Warm?"), _message("assistant", "I look.", tool_calls=[call])]
    told.append(_message("tool", "20 degrees", tool_call_id=call.id))
    assert stub.GenerateOnce(_request(*told)).answers[0].text == "Warm."


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (_request(tools=[pb.Tool()]), "tools[0].function.name"),
        (
            _request(tools=[pb.Tool(function=pb.Function(name="a", parameters="{"))]),
            "tools[0].function.parameters",
        ),
        (
            _request(tools=[pb.Tool(function=pb.Function(name="a", parameters="[]"))]),
            "tools[0].function.parameters",
        ),
        (_request(tools=[pb.Tool()] * 129), "tools"),
        (_request(tool_choice="maybe"), "tool_choice"),
        (_request(tool_name="news"), "tool_name"),
        (_request(tool_name="weather", tool_choice="auto"), "tool_name"),
        (
            _request(
                _message(
                    "assistant",
                    tool_calls=[pb.ToolCall(function=pb.FunctionCall(name="a", arguments="["))],
                )
            ),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (pb.GenerateRequest(text="x", tools=_request().tools), "tools"),
    ],
)
def test_grpc_names_the_field(
    stub: octavo_pb2_grpc.InferenceStub, request_: pb.GenerateRequest, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateOnce(request_)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{field}:")


def test_our_own_client(served: HttpServed, planted: type[Planted]) -> None:
    settings = {**GREEDY, "ignore_eos": True}
    with octavo.Client(served.address) as client:
        deltas = list(client.chat(ASKED, tools=[WEATHER], tool_choice="auto", **settings))
        (call,) = [call for delta in deltas for call in delta.tool_calls]
        assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
        planted.text = "Warm."
        function = {"name": call.name, "arguments": call.arguments}
        told = [
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
            {"role": "tool", "content": "20 degrees", "tool_call_id": call.id},
        ]
        answer = client.chat(told, tools=[WEATHER], **settings)
        assert "".join(delta.text for delta in answer) == "Warm."
        planted.text = f"{CALL}\n{CALL}"
        for parallel, count in ((None, 2), (True, 2), (False, 1)):
            more: dict[str, Any] = {"tools": [WEATHER], "parallel_tool_calls": parallel}
            reply = client.generate_once(ASKED, **more, **settings)
            deltas = list(client.chat(ASKED, **more, **settings))
            assert len(reply.answers[0].tool_calls) == count
            assert sum(len(delta.tool_calls) for delta in deltas) == count
        with pytest.raises(ClientError, match=r"tools\[0\]"):
            client.chat(ASKED, tools=[5])
        with pytest.raises(ClientError, match=r"parallel_tool_calls.*'no'"):
            client.chat(ASKED, tools=[WEATHER], parallel_tool_calls="no")  # type: ignore[arg-type]


def test_async_llm(served: HttpServed, planted: type[Planted]) -> None:
    async def ask() -> list[OutputDelta]:
        return [each async for each in served.engine.chat(ASKED, PARAMS, tools=[WEATHER])]

    async def ask_for_one() -> list[OutputDelta]:
        one: dict[str, Any] = {"tools": [WEATHER], "parallel_tool_calls": False}
        return [each async for each in served.engine.chat(ASKED, PARAMS, **one)]

    deltas = served.run(ask())
    (call,) = [call for delta in deltas for call in delta.tool_calls]
    assert isinstance(call, octavo.ToolCall) and json.loads(call.arguments) == ARGUMENTS
    assert deltas[-1].finish_reason == "stop"
    planted.text = f"{CALL}\n{CALL}"
    assert [sum(len(d.tool_calls) for d in served.run(a())) for a in (ask, ask_for_one)] == [2, 1]


def test_llm(checkpoint: Path, planted: type[Planted]) -> None:
    settings: dict[str, Any] = {"max_model_len": 2048, "kv_cache_memory_bytes": 8_000_000}
    with octavo.LLM(checkpoint, dtype="float32", **settings) as llm:
        two = octavo.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, n=2)
        results = llm.chat([ASKED, ASKED], two, tools=[WEATHER])
        for output in (output for result in results for output in result.outputs):
            assert output.text == "I look." and output.finish_reason == "stop"
            assert [json.loads(call.arguments) for call in output.tool_calls] == [ARGUMENTS]
        planted.text = f"{CALL}\n{CALL}"
        (one,) = llm.chat(ASKED, PARAMS, tools=[WEATHER], parallel_tool_calls=False)
        assert len(one.outputs[0].tool_calls) == 1
        (plain,) = llm.chat(ASKED, PARAMS)
        assert plain.outputs[0].text == planted.text and not plain.outputs[0].tool_calls
        with pytest.raises(InputError, match=r"^tools\[0\].type"):
            llm.chat(ASKED, PARAMS, tools=[{}])
