"""The gRPC services: what each method gives, how each error reaches a caller, and what misuse does.

Callers are grpcio's own: stubs, bare channels, and messages that server reflection alone described.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served, wait_for
from octavo.engine.client.errors import ClientError
from octavo.engine.client.requests import fill, with_params
from octavo.engine.config.engine_config import EngineConfig
from octavo.engine.errors import RETRYABLE, EngineDead
from octavo.engine.observability.prometheus import metrics_text
from octavo.engine.outputs import OutputDelta, Usage
from octavo.engine.request_stream import MAX_WAITING, OutputQueue, join, merge
from octavo.engine.server import errors
from octavo.engine.server.grpc_api import control, inference, server, status
from octavo.engine.server.grpc_api.messages import read_sampling
from octavo.engine.server.metadata import read_metadata
from octavo.proto import make_docs, octavo_pb2_grpc
from octavo.proto import octavo_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
LONG = {**GREEDY, "max_tokens": 900}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    served = Served(
        checkpoint, dtype="float32", max_model_len=1024, kv_cache_memory_bytes=4_000_000
    )
    yield served
    served.wait_empty()
    served.close()


class Stubs:
    def __init__(self, address: str, *options: tuple[str, int]) -> None:
        self.channel = grpc.insecure_channel(address, options=options)
        self.inference = octavo_pb2_grpc.InferenceStub(self.channel)
        self.control = octavo_pb2_grpc.ControlStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def __enter__(self) -> Stubs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()


@pytest.fixture
def stubs(served: Served) -> Iterator[Stubs]:
    with Stubs(served.address) as stubs:
        yield stubs


def request(text: str = "What is it?", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**{**GREEDY, **sampling}))


def talk(*parts: pb.ContentPart) -> pb.Conversation:
    return pb.Conversation(messages=[pb.Message(role="user", content=parts)])


def picture(seed: int = 1, size: int = 56) -> pb.MediaItem:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    source = pb.Pixels(data=pixels.tobytes(), shape=pixels.shape)
    return pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE, pixels=source)


def seen(seed: int = 1) -> pb.GenerateRequest:
    """A question about an image."""
    parts = (pb.ContentPart(media=picture(seed)), pb.ContentPart(text="What is it?"))
    return pb.GenerateRequest(conversation=talk(*parts), sampling=request().sampling)


def refusal(call: Callable[[], Any]) -> tuple[str, str, str, bool]:
    """Code, text, field and `retryable` of a call that must fail, by its status's details."""
    with pytest.raises(grpc.RpcError) as refused:
        found = call()
        list(found) if hasattr(found, "__iter__") else None
    rich = rpc_status.from_call(refused.value)
    assert rich is not None, (refused.value.code(), refused.value.details())
    assert rich.message == refused.value.details()
    failure, bad = pb.Failure(), error_details_pb2.BadRequest()
    assert rich.details[0].Unpack(failure)
    assert failure.code == refused.value.code().name
    field = ""
    if len(rich.details) > 1:
        assert rich.details[1].Unpack(bad)
        field = bad.field_violations[0].field
    return failure.code, rich.message, field, failure.retryable


# What each method gives.


def test_a_call_that_reflection_alone_described(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "octavo.v1.Inference",
            "octavo.v1.Control",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = descriptor_pool.DescriptorPool(database)
        for service in ("Inference", "Control"):
            found = pool.FindServiceByName(f"octavo.v1.{service}")
            known = pb.DESCRIPTOR.services_by_name[service]
            assert [m.name for m in found.methods] == [m.name for m in known.methods]
        method = pool.FindServiceByName("octavo.v1.Inference").FindMethodByName("GenerateOnce")
        make = message_factory.GetMessageClass(method.input_type)
        reply = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(
            "/octavo.v1.Inference/GenerateOnce", make.SerializeToString, reply.FromString
        )
        asked = make(text="What is it?", sampling={**GREEDY})
        answer = call(asked)
    with octavo.Client(served.address) as client:
        deltas = list(client.generate("What is it?", **GREEDY))
    assert answer.answers[0].text == "".join(delta.text for delta in deltas)


def test_generate_once_is_the_stream_put_together(stubs: Stubs) -> None:
    asked = seen()
    asked.sampling.n = 2
    wild = pb.SamplingParams(temperature=5.0, top_k=0, top_p=1.0, seed=7)
    asked.sampling.MergeFrom(wild)
    asked.request_id = "both"
    deltas = list(stubs.inference.Generate(asked))
    reply = stubs.inference.GenerateOnce(asked)
    assert reply.request_id == "both"
    for index, answer in enumerate(reply.answers):
        parts = [delta for delta in deltas if delta.index == index]
        assert answer.index == index
        assert answer.text == "".join(part.text for part in parts)
        assert list(answer.token_ids) == [t for part in parts for t in part.token_ids]
        assert answer.finish_reason == pb.FINISH_REASON_LENGTH
        assert not answer.HasField("usage") and not answer.media
    assert len(reply.answers) == 2
    assert reply.answers[0].token_ids != reply.answers[1].token_ids
    assert reply.usage.output_tokens == deltas[-1].usage.output_tokens == 24
    assert list(reply.media) == list(deltas[0].media) and len(reply.media) == 1
    assert reply.HasField("media_times")


@pytest.mark.parametrize("text", ["hello there", "Zürich 東京 👩‍🚀 <|im_end|>", "", "a\nb\tc"])
def test_tokenize_and_back(stubs: Stubs, checkpoint: Path, text: str) -> None:
    reference = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = list(stubs.inference.Tokenize(pb.TokenizeRequest(text=text)).ids)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    plain = list(stubs.inference.Tokenize(pb.TokenizeRequest(text=text, plain=True)).ids)
    end = reference.token_to_id("<|im_end|>")
    assert (end in ids, end in plain) == ("<|im_end|>" in text, False)
    if ids:
        for skip in (False, True):
            asked = pb.DetokenizeRequest(ids=ids, skip_special_tokens=skip)
            expected = reference.decode(ids, skip_special_tokens=skip)
            assert stubs.inference.Detokenize(asked).text == expected


def test_a_conversation_s_tokens_are_those_that_are_answered(stubs: Stubs) -> None:
    parts = (pb.ContentPart(text="Two: "), pb.ContentPart(text="what is it?"))
    ids = stubs.inference.Tokenize(pb.TokenizeRequest(conversation=talk(*parts))).ids
    asked = pb.GenerateRequest(conversation=talk(*parts), sampling=request().sampling)
    reply = stubs.inference.GenerateOnce(asked)
    assert reply.usage.prompt_tokens == len(ids)
    same = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=request().sampling)
    assert stubs.inference.GenerateOnce(same).answers[0].text == reply.answers[0].text
    info = stubs.control.GetModelInfo(pb.GetModelInfoRequest())
    for media in (pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE), picture()):
        more = talk(pb.ContentPart(media=media), *parts)
        found = list(stubs.inference.Tokenize(pb.TokenizeRequest(conversation=more)).ids)
        assert found.count(info.image_token_id) == 1


def test_model_and_server_info(stubs: Stubs, served: Served, checkpoint: Path) -> None:
    info = stubs.control.GetModelInfo(pb.GetModelInfoRequest())
    config = json.loads((checkpoint / "config.json").read_text())
    assert (info.name, info.max_model_len) == (checkpoint.name, 1024)
    text = {**config, **config.get("text_config", {})}
    for name in ("hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings"):
        assert getattr(info, name) == text[name]
    assert info.num_layers == text["num_hidden_layers"]
    about = stubs.control.GetServerInfo(pb.GetServerInfoRequest())
    assert (about.version, about.num_workers, about.has_api_keys) == (octavo.__version__, 1, False)
    assert json.loads(about.settings["max_num_seqs"]) == served.engine.config.max_num_seqs
    assert json.loads(about.settings["dtype"]) == "float32"
    assert not set(about.settings) & set(control.PRIVATE)
    assert not any("/" in value for value in about.settings.values()), "a path"


def test_load(stubs: Stubs) -> None:
    before = stubs.control.GetLoad(pb.GetLoadRequest())
    assert (before.num_running, before.num_waiting) == (0, 0)
    assert before.num_free_blocks == before.num_blocks > 0
    stream = stubs.inference.Generate(request(**LONG))
    next(stream)
    during = stubs.control.GetLoad(pb.GetLoadRequest())
    assert during.num_running == 1 and during.num_free_blocks < during.num_blocks
    stream.cancel()
    wait_for(lambda: stubs.control.GetLoad(pb.GetLoadRequest()).num_running == 0)
    for _ in range(3):
        list(stubs.inference.Generate(seen(77)))
    after = stubs.control.GetLoad(pb.GetLoadRequest())
    assert after.num_output_tokens >= before.num_output_tokens + 36
    wait_for(lambda: stubs.control.GetLoad(pb.GetLoadRequest()).tokens_per_second > 0)
    assert before.prefix_hit_rate < after.prefix_hit_rate < 1
    assert 0 <= after.encoder_hit_rate <= 1 and not after.is_draining


def test_load_and_metrics_are_the_same_numbers(served: Served, stubs: Stubs) -> None:
    for _ in range(2):
        list(stubs.inference.Generate(seen(78)))
    load = stubs.control.GetLoad(pb.GetLoadRequest())
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(
            metrics_text(served.engine.engine.stats).decode()
        )
        for sample in family.samples
        if not sample.labels
    }
    assert load.prefix_hit_rate == pytest.approx(found["octavo_prefix_cache_hit_ratio"])
    assert load.encoder_hit_rate == pytest.approx(found["octavo_encoder_cache_hit_ratio"])
    assert load.num_output_tokens == found["octavo_output_tokens_total"]
    assert 0 < load.prefix_hit_rate < 1


def test_the_encoder_s_hits_are_counted(served: Served) -> None:
    cache = served.engine.engine.scheduler.encoder_cache
    with Stubs(served.address) as stubs:
        list(stubs.inference.Generate(seen(78)))
        found, encoded = cache.num_found, cache.num_added
        asked = seen(78)
        asked.conversation.messages[0].content[1].text = "Another question"
        asked.conversation.messages[0].content.insert(0, pb.ContentPart(text="Before it. " * 4))
        list(stubs.inference.Generate(asked))  # its prefix is another, so the image is wanted
    assert (cache.num_found, cache.num_added) == (found + 1, encoded)


@pytest.mark.parametrize("service", ["inference", "control"])
def test_abort_through_either_service(stubs: Stubs, service: str) -> None:
    asked = request(**LONG)
    asked.request_id = f"by {service}"
    stream = stubs.inference.Generate(asked)
    next(stream)
    reply = getattr(stubs, service).Abort(pb.AbortRequest(request_id=asked.request_id))
    assert reply.found
    assert [delta.finish_reason for delta in stream][-1] == pb.FINISH_REASON_ABORT
    assert not getattr(stubs, service).Abort(pb.AbortRequest(request_id="nobody")).found


# Errors.

NEWER = b"\xb8\x3e\x01"  # a field that nobody knows


def item_of(frames: pb.Frames) -> pb.MediaItem:
    return pb.MediaItem(kind=pb.MEDIA_KIND_VIDEO, frames=frames)


REFUSED = [
    (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
    (request(temperature=-1.0), "INVALID_ARGUMENT", "sampling.temperature"),
    (request(seed=2**64 - 1), "INVALID_ARGUMENT", "sampling.seed"),
    (request("x" * 40_000), "INVALID_ARGUMENT", "prompt"),
    (request("x" * 3000), "INVALID_ARGUMENT", "prompt"),
    (pb.GenerateRequest(text="x", priority=10), "INVALID_ARGUMENT", "priority"),
    (pb.GenerateRequest(text="x", timeout_s=float("nan")), "INVALID_ARGUMENT", "timeout_s"),
    (pb.GenerateRequest(text="x", cache_salt="s" * 300), "INVALID_ARGUMENT", "cache_salt"),
    (pb.GenerateRequest(text="x", request_id="r" * 300), "INVALID_ARGUMENT", "request_id"),
    (pb.GenerateRequest(text="x", media=[pb.MediaItem()]), "INVALID_ARGUMENT", "media[0].kind"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[999])), "INVALID_ARGUMENT", "token_ids.ids"),
    (
        pb.GenerateRequest(conversation=talk(pb.ContentPart())),
        "INVALID_ARGUMENT",
        "conversation.messages[0].content[0]",
    ),
    (pb.GenerateRequest(text="x", model="gpt-9"), "NOT_FOUND", "model"),
    (pb.GenerateRequest.FromString(b"\x1a\x01x\xb8\x3e\x01"), "UNIMPLEMENTED", ""),
    (
        pb.GenerateRequest(text="x", sampling=pb.SamplingParams.FromString(b"\xb8\x3e\x01")),
        "UNIMPLEMENTED",
        "sampling",
    ),
    *(
        (
            pb.GenerateRequest(conversation=pb.Conversation(messages=[message])),
            "UNIMPLEMENTED",
            f"conversation.messages[0]{field}",
        )
        for message, field in (
            (pb.Message.FromString(NEWER), ""),
            (pb.Message(role="user", content=[pb.ContentPart.FromString(NEWER)]), ".content[0]"),
            (pb.Message(tool_calls=[pb.ToolCall.FromString(NEWER)]), ".tool_calls[0]"),
        )
    ),
    (
        pb.GenerateRequest(text="x", media=[pb.MediaItem.FromString(NEWER)]),
        "UNIMPLEMENTED",
        "media[0]",
    ),
    (
        pb.GenerateRequest(text="x", media=[item_of(pb.Frames.FromString(NEWER))]),
        "UNIMPLEMENTED",
        "media[0].frames",
    ),
    (
        pb.GenerateRequest(
            text="x", media=[item_of(pb.Frames(frames=[pb.Frame.FromString(NEWER)]))]
        ),
        "UNIMPLEMENTED",
        "media[0].frames[0]",
    ),
    (pb.GenerateRequest(token_ids=pb.TokenIds.FromString(NEWER)), "UNIMPLEMENTED", "token_ids"),
    (
        pb.GenerateRequest(conversation=pb.Conversation.FromString(NEWER)),
        "UNIMPLEMENTED",
        "conversation",
    ),
    (
        pb.GenerateRequest(tools=[pb.Tool(function=pb.Function.FromString(b"\x0a\x01a" + NEWER))]),
        "UNIMPLEMENTED",
        "tools[0].function",
    ),
]


@pytest.mark.parametrize(("asked", "code", "field"), REFUSED)
@pytest.mark.parametrize("method", ["Generate", "GenerateOnce"])
def test_what_is_rejected_names_its_field(
    stubs: Stubs, method: str, asked: pb.GenerateRequest, code: str, field: str
) -> None:
    found = refusal(lambda: getattr(stubs.inference, method)(asked))
    assert (found[0], found[2], found[3]) == (code, field, False), found


def test_other_methods_name_their_fields_too(stubs: Stubs) -> None:
    for call, field in (
        (lambda: stubs.inference.Tokenize(pb.TokenizeRequest()), "prompt"),
        (lambda: stubs.inference.Tokenize(pb.TokenizeRequest(text="x" * 1_000_000)), "prompt"),
        (lambda: stubs.inference.Detokenize(pb.DetokenizeRequest(ids=[999])), "token_ids.ids"),
        (lambda: stubs.control.Drain(pb.DrainRequest(timeout_s=-1)), "timeout_s"),
    ):
        found = refusal(call)
        assert (found[0], found[2]) == ("INVALID_ARGUMENT", field)


def test_a_name_in_use(stubs: Stubs) -> None:
    asked = request(**LONG)
    asked.request_id = "mine"
    stream = stubs.inference.Generate(asked)
    next(stream)
    for again in (stubs.inference.Generate, stubs.inference.GenerateOnce):
        code, _, field, retryable = refusal(lambda again=again: again(asked))
        assert (code, field, retryable) == ("ALREADY_EXISTS", "request_id", True)
    stream.cancel()


def test_too_much_is_waiting(stubs: Stubs, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = dict.fromkeys(map(str, range(10_000)))  # as if so many requests were running
    monkeypatch.setattr(served.engine, "_streams", streams)
    found = refusal(lambda: stubs.inference.GenerateOnce(request()))
    assert found[0] == "RESOURCE_EXHAUSTED" and found[1].startswith("10000 requests are running or")
    assert found[2:] == ("", True)


@pytest.mark.parametrize("timeout", [0.0, 0.05])
def test_what_fails_after_admission_ends_with_an_event_and_a_status(
    served: Served, stubs: Stubs, timeout: float
) -> None:
    asked = request(n=2, **{**LONG, "max_tokens": 1000})
    asked.timeout_s = timeout
    events: list[pb.GenerateDelta] = []

    def read() -> None:
        for event in stubs.inference.Generate(asked):
            events.append(event)

    code, text, _, retryable = refusal(read)
    assert (code, retryable) == ("DEADLINE_EXCEEDED", True)
    assert [event.HasField("failure") for event in events[:-1]] == [False] * (len(events) - 1)
    last = events[-1]
    assert (last.failure.code, last.failure.text, last.failure.retryable) == (code, text, True)
    assert last.HasField("usage") and last.request_id
    assert refusal(lambda: stubs.inference.GenerateOnce(asked))[0] == code
    with octavo.Client(served.address) as client, pytest.raises(ClientError) as failed:
        list(client.generate("x", timeout_s=timeout, **LONG))
    assert (failed.value.code, failed.value.retryable) == (code, True)


def test_a_broken_video_fails_after_admission_or_before_as_the_caller_s_error(stubs: Stubs) -> None:
    item = pb.MediaItem(kind=pb.MEDIA_KIND_VIDEO, data=b"junk")
    asked = pb.GenerateRequest(conversation=talk(pb.ContentPart(media=item)))
    code, _, field, retryable = refusal(lambda: stubs.inference.Generate(asked))
    assert (code, retryable) == ("INVALID_ARGUMENT", False)
    assert field == "conversation.messages[0].content[0].video"


async def _dying(deltas: int) -> AsyncGenerator[OutputDelta, None]:
    for index in range(deltas):
        yield OutputDelta("it", token_ids=(index,))
    raise EngineDead("rank 0 ended")


def test_workers_that_die_are_reported_of_by_an_event_where_the_stream_has_started() -> None:
    async def read(deltas: int) -> tuple[list[pb.GenerateDelta], Any]:
        call = inference._Call("it", _dying(deltas))
        return [message async for message in inference._messages(call)], call.fault

    messages, fault = asyncio.run(read(2))
    assert [m.failure.code for m in messages] == ["", "", "UNAVAILABLE"]
    assert messages[-1].request_id == "it" and messages[-1].failure.retryable
    assert fault.code == "UNAVAILABLE"
    with pytest.raises(EngineDead):
        asyncio.run(read(0))


def test_no_library_s_text_reaches_a_caller(
    stubs: Stubs, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = served.engine.engine.processor.reader

    def broken(*args: Any) -> Any:
        raise ValueError("/usr/lib/secret.so: bad shape")

    for name in ("read", "tokenize", "detokenize"):
        monkeypatch.setattr(reader, name, broken)
    for call in (
        lambda: stubs.inference.Generate(request()),
        lambda: stubs.inference.GenerateOnce(request()),
        lambda: stubs.inference.Tokenize(pb.TokenizeRequest(text="x")),
        lambda: stubs.inference.Detokenize(pb.DetokenizeRequest(ids=[1])),
    ):
        assert refusal(call) == ("INTERNAL", errors.OURS.message, "", False)
    assert caplog.text.count("/usr/lib/secret.so") >= 4, "the log is to have it"


@pytest.mark.parametrize(
    "cause",
    [
        "a worker failed: torch.OutOfMemoryError: 3 GiB",
        "the worker of rank 1 (10.0.0.2:7000) is not there: failed to connect: ipv4:10.0.0.2:7000",
        "a step failed in the engine: KeyError('secret')",
        "[Errno 28] No space left on device: '/tmp/octavo-secret'",
    ],
)
def test_what_ended_the_engine_reaches_no_caller(cause: str) -> None:
    """Libraries' texts, and addresses and paths of the server."""
    assert errors.error_info(EngineDead(cause)) == errors.STOPPED


@pytest.mark.parametrize("path", ["Inference/Generate", "Inference/GenerateOnce", "Control/Drain"])
def test_bytes_that_are_no_message(stubs: Stubs, path: str) -> None:
    call = stubs.channel.unary_stream(f"/octavo.v1.{path}")
    code, text, _, _ = refusal(lambda: call(b"\xff\xff\xff"))
    assert code == "INVALID_ARGUMENT" and "3 bytes" in text


@pytest.mark.parametrize(
    ("conversation", "text"),
    [
        (pb.Conversation(messages=[pb.Message()] * 4097), "4097 messages"),
        (
            pb.Conversation(messages=[pb.Message(content=[pb.ContentPart()] * ((1 << 14) + 1))]),
            "16385 parts",
        ),
        (
            pb.Conversation(messages=[pb.Message(tool_calls=[pb.ToolCall()] * 8193)] * 2),
            "over 16384 tool calls",
        ),
        (
            pb.Conversation(
                messages=[
                    pb.Message(
                        tool_calls=[
                            pb.ToolCall(function=pb.FunctionCall(arguments="[" * (1 << 19)))
                        ]
                    )
                ]
                * 3
            ),
            "characters in tool calls",
        ),
    ],
    ids=["messages", "parts", "calls", "arguments"],
)
def test_many_small_things_are_rejected_before_they_are_gone_through(
    stubs: Stubs, conversation: pb.Conversation, text: str
) -> None:
    """All requests would wait for that."""
    for call in (
        lambda: stubs.inference.Tokenize(pb.TokenizeRequest(conversation=conversation)),
        lambda: stubs.inference.GenerateOnce(pb.GenerateRequest(conversation=conversation)),
    ):
        code, told, field, _ = refusal(call)
        assert (code, field) == ("INVALID_ARGUMENT", "conversation.messages") and text in told


def test_a_server_that_warms_up_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers may be gone, and waited for."""
    ends: list[str] = []

    async def warm_up(engine: Any) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ends.append("cancelled")

    async def stop() -> bool:
        asked = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, asked.set)
        return await server._warmed_up(None, asked)  # type: ignore[arg-type]

    monkeypatch.setattr(server, "warm_up", warm_up)
    assert asyncio.run(stop()) is False and ends == ["cancelled"]


def test_many_large_tools_are_rejected_unread(stubs: Stubs) -> None:
    function = pb.Function(name="f", parameters="[" * (1 << 19))
    tools = [pb.Tool(function=function)] * 3
    asked = pb.GenerateRequest(conversation=talk(pb.ContentPart(text="x")), tools=tools)
    code, text, field, _ = refusal(lambda: stubs.inference.GenerateOnce(asked))
    assert (code, field) == ("INVALID_ARGUMENT", "tools") and "over 1048576 characters" in text


def test_health_tells_of_workers_that_are_away_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    async def set_health(status: int) -> None:
        told.append(status)

    restarts = SimpleNamespace(is_long=False)
    engine: Any = SimpleNamespace(engine=SimpleNamespace(restarts=restarts))
    made: Any = SimpleNamespace(work=SimpleNamespace(is_draining=False), set_health=set_health)
    monkeypatch.setattr(server, "HEALTH_CHECK", 0.001)

    async def watch() -> None:
        watching = asyncio.create_task(server._tell_health(made, engine))
        for is_long in (False, True, False):
            restarts.is_long = is_long
            await asyncio.sleep(0.02)
        made.work.is_draining = restarts.is_long = True
        await watching

    asyncio.run(watch())
    assert told == [server.NOT_SERVING, server.SERVING]


@pytest.mark.parametrize("address", ["127.0.0.1", "host", "[::1]"])
def test_an_address_without_a_port_is_rejected(address: str) -> None:
    """gRPC would take 443."""
    with pytest.raises(ClientError, match="must be HOST:PORT"):
        octavo.Client(address)


def test_every_setting_is_reported_or_private(tmp_path: Path) -> None:
    """Those that name places on the server's machine, or hosts of its network, are private."""
    config = EngineConfig(
        model=tmp_path,
        trace_file=tmp_path,
        allowed_media_paths=(tmp_path,),
        allowed_media_domains=("secret.example",),
        workers=("10.0.0.1:7000",),
        worker_tls=tmp_path,
    )
    told = control.public_settings(config)
    assert {*told, *control.PRIVATE} == {field.name for field in fields(EngineConfig)}
    assert not {*told} & {*control.PRIVATE}
    assert not any(s in " ".join(told.values()) for s in (str(tmp_path), "10.0.0.1", "secret"))


def test_bytes_that_are_no_message_of_reflection(stubs: Stubs) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call = stubs.channel.stream_stream(path)
    assert refusal(lambda: call(iter([b"\xff\xff\xff"])))[0] == "INVALID_ARGUMENT"


def test_every_code_is_grpc_s_and_is_explained() -> None:
    text = (ROOT / "proto/octavo.proto").read_text().partition("syntax =")[0]
    for code in RETRYABLE:
        assert hasattr(grpc.StatusCode, code)
        assert f"\n// {code}: " in text


@pytest.mark.parametrize(
    "text", ["x" * 50_000, "ü" * 50_000, "👩‍🚀" * 20_000, "a b%\n" * 9000, "\x00" * 9000, "short"]
)
def test_a_long_text_still_arrives(
    stubs: Stubs, served: Served, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """gRPC drops metadata of over 8 KiB, and the status with it."""

    def broken(*args: Any) -> Any:
        raise octavo.engine.errors.InputError("prompt", text)

    monkeypatch.setattr(served.engine.engine.processor.reader, "tokenize", broken)
    found = refusal(lambda: stubs.inference.Tokenize(pb.TokenizeRequest(text="x")))
    assert found[0] == "INVALID_ARGUMENT" and found[2] == "prompt"
    assert found[1][:150] == f"prompt: {text}"[:150]


def test_a_field_s_path() -> None:
    assert status.path_of("messages[1].content[0].image") == (
        "conversation.messages[1].content[0].image"
    )
    assert status.path_of("top_p") == "sampling.top_p"
    assert status.path_of("media[0].kind") == "media[0].kind"


# Metadata.


def test_metadata_names_the_request_and_its_priority(
    stubs: Stubs, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "octavo.server")
    given: list[dict[str, Any]] = []
    generate = served.engine.generate

    def spy(*args: Any, **more: Any) -> Any:
        given.append(more)
        return generate(*args, **more)

    monkeypatch.setattr(served.engine, "generate", spy)
    beside = (("x-request-id", "from-the-gateway"), ("x-priority", "2"), ("traceparent", TRACE))
    delta = next(stubs.inference.Generate(request(), metadata=beside))
    assert delta.request_id == "from-the-gateway"
    assert given[-1]["priority"] == 2
    assert f"'from-the-gateway': traceparent {TRACE}" in caplog.text
    own = request()
    own.request_id, own.priority = "my own", 7
    assert stubs.inference.GenerateOnce(own, metadata=beside).request_id == "my own"
    assert given[-1]["priority"] == 7
    caplog.clear()
    assert stubs.inference.GenerateOnce(request(), metadata=(("traceparent", "junk"),)).answers
    assert "traceparent" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("x-priority", "10"), ("x-priority", "high"), ("x-priority", ""), ("x-request-id", "x" * 300)],
)
def test_metadata_that_cannot_be_is_rejected(stubs: Stubs, name: str, value: str) -> None:
    found = refusal(lambda: stubs.inference.GenerateOnce(request(), metadata=((name, value),)))
    assert (found[0], found[2]) == ("INVALID_ARGUMENT", name)


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (TRACE, True),
        (f"cc{TRACE[2:]}-what-the-future-will-be-like", True),
        (f"{TRACE}-more", False),
        (f"ff{TRACE[2:]}", False),
        (TRACE.upper(), False),
        (TRACE.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), False),
        (TRACE.replace("b7ad6b7169203331", "0" * 16), False),
        (TRACE[:-1], False),
        (f" {TRACE}", False),
        ("", False),
    ],
)
def test_traceparent_as_w3c_says(text: str, is_valid: bool) -> None:
    assert read_metadata([("traceparent", text)]).traceparent == (text if is_valid else "")


# Health and drain.


def test_health_of_each_service(stubs: Stubs) -> None:
    for service in ("", "octavo.v1.Inference", "octavo.v1.Control"):
        assert stubs.health.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
    with pytest.raises(grpc.RpcError) as refused:
        stubs.health.Check(health_pb2.HealthCheckRequest(service="octavo.v1.Nothing"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.lesson("L31")
def test_message_size_and_a_drain_that_health_tells_of(served: Served) -> None:
    options = dict(server.OPTIONS)
    assert options["grpc.max_receive_message_length"] == 256 << 20
    assert options["grpc.max_send_message_length"] == 256 << 20
    assert options["grpc.keepalive_permit_without_calls"] == 1
    with served.another() as address, Stubs(address) as stubs:
        watches = [
            stubs.health.Watch(health_pb2.HealthCheckRequest(service=service))
            for service in ("", "octavo.v1.Inference", "octavo.v1.Control")
        ]
        assert [next(watch).status for watch in watches] == [SERVING] * 3
        stream = stubs.inference.Generate(request(max_tokens=400))
        next(stream)
        left = stubs.control.Drain(pb.DrainRequest(timeout_s=0.0))
        assert left.num_running == 1
        assert [next(watch).status for watch in watches] == [NOT_SERVING] * 3
        for call in (stubs.inference.Generate, stubs.inference.GenerateOnce):
            found = refusal(lambda call=call: call(request()))
            assert (found[0], found[3]) == ("UNAVAILABLE", True)
        assert stubs.control.GetLoad(pb.GetLoadRequest()).is_draining
        assert stubs.control.Drain(pb.DrainRequest()).num_running == 0  # waits for the stream
        assert [delta.finish_reason for delta in stream][-1] == pb.FINISH_REASON_LENGTH
        for watch in watches:
            watch.cancel()


@pytest.mark.lesson("L30")
def test_proto_defaults_a_drain_of_no_time_is_not_one_of_any_time(served: Served) -> None:
    assert pb.DrainRequest.DESCRIPTOR.fields_by_name["timeout_s"].has_presence
    for name, field in pb.SamplingParams.DESCRIPTOR.fields_by_name.items():
        assert field.has_presence or field.is_repeated, name
    for name in ("priority", "timeout_s"):
        assert pb.GenerateRequest.DESCRIPTOR.fields_by_name[name].has_presence


@pytest.mark.parametrize(
    ("peer", "is_known", "may"),
    [
        ("ipv4:127.0.0.1:5000", False, True),
        ("ipv6:%5B::1%5D:5000", False, True),
        ("unix:/tmp/x", False, True),
        ("ipv4:10.0.0.9:5000", False, False),
        ("ipv4:10.0.0.9:5000", True, True),
        ("ipv6:%5B2001:db8::1%5D:5000", False, False),
    ],
)
def test_a_stranger_does_not_drain_an_open_server(peer: str, is_known: bool, may: bool) -> None:
    if may:
        control.check_may_drain(peer, is_known)
        return
    with pytest.raises(errors.RequestRejected) as refused:
        control.check_may_drain(peer, is_known)
    assert refused.value.code == "PERMISSION_DENIED"


# gRPC's interop cases.


def test_cancel_after_begin(stubs: Stubs, served: Served) -> None:
    for _ in range(20):
        stubs.inference.Generate(request(**LONG)).cancel()
    future = stubs.inference.GenerateOnce.future(request(**LONG))
    future.cancel()
    assert future.cancelled()
    served.wait_empty()


def test_cancel_after_first_response(stubs: Stubs, served: Served) -> None:
    streams = [stubs.inference.Generate(request(**LONG)) for _ in range(10)]
    for stream in streams:
        next(stream)
        stream.cancel()
        with pytest.raises(grpc.RpcError) as cancelled:
            list(stream)
        assert cancelled.value.code() is grpc.StatusCode.CANCELLED
    served.wait_empty()


def test_the_call_s_deadline_is_the_request_s(stubs: Stubs, served: Served) -> None:
    for call in (stubs.inference.Generate, stubs.inference.GenerateOnce):
        with pytest.raises(grpc.RpcError) as late:
            found = call(request(**{**LONG, "max_tokens": 1000}), timeout=0.05)
            list(found) if call is stubs.inference.Generate else None
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    served.wait_empty()


def test_large_messages(stubs: Stubs) -> None:
    """Each way: an image of 12 MB, and more token ids than 4 MiB."""
    asked = seen()
    asked.conversation.messages[0].content[0].media.CopyFrom(picture(3, 2000))
    asked.conversation.messages[0].content[0].media.options.max_pixels = 50176
    assert asked.ByteSize() > 11 << 20
    assert stubs.inference.GenerateOnce(asked).usage.output_tokens == 12
    big = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 5_000_000))
    assert refusal(lambda: stubs.inference.GenerateOnce(big))[0] == "INVALID_ARGUMENT"


@pytest.mark.slow
def test_a_message_beyond_the_limit(served: Served) -> None:
    open_ended = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(served.address, options=open_ended) as channel:
        call = channel.unary_unary("/octavo.v1.Inference/GenerateOnce")
        with pytest.raises(grpc.RpcError) as refused:
            call(bytes((256 << 20) + 1))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError) as read:  # no protobuf, but it came through
            call(b"\xff" * (255 << 20))
        assert read.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unimplemented(stubs: Stubs) -> None:
    for path in ("/octavo.v1.Inference/Nothing", "/octavo.v1.Nothing/Generate"):
        with pytest.raises(grpc.RpcError) as refused:
            stubs.channel.unary_unary(path)(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_many_streams_on_one_connection(served: Served, stubs: Stubs) -> None:
    texts = [f"Question {number % 7}?" for number in range(150)]
    expected = {text: stubs.inference.GenerateOnce(request(text)).answers[0] for text in texts[:7]}

    async def ask(stub: Any, text: str) -> list[int]:
        return [t async for delta in stub.Generate(request(text)) for t in delta.token_ids]

    async def all_at_once() -> list[list[int]]:
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = octavo_pb2_grpc.InferenceStub(channel)
            return await asyncio.gather(*(ask(stub, text) for text in texts))

    found = asyncio.run(all_at_once())
    assert found == [list(expected[text].token_ids) for text in texts]


# Readers that are slow.


def made_deltas(rng: random.Random, answers: int, count: int) -> list[OutputDelta]:
    """A request's deltas, as the engine makes them."""
    left = [count] * answers
    deltas: list[OutputDelta] = []
    while any(left):
        index = rng.choice([i for i, n in enumerate(left) if n])
        left[index] -= 1
        first = {"media_times": octavo.engine.outputs.InputTimes(0, 0)} if not deltas else {}
        ends = {} if left[index] else {"finish_reason": "length"}
        ends |= {} if any(left) else {"usage": Usage(1, answers * count)}
        token = rng.randrange(1000)
        deltas.append(OutputDelta("it", index, f"{token} ", (token,), **first, **ends))
    return deltas


@pytest.mark.parametrize("seed", range(20))
def test_a_slow_reader_gets_the_same_in_fewer_deltas(seed: int) -> None:
    rng = random.Random(seed)
    answers = rng.choice([1, 2, 5, 64])
    deltas = made_deltas(rng, answers, 100)

    async def read() -> tuple[list[OutputDelta], int]:
        backlog: OutputQueue[Exception] = OutputQueue()
        taken: list[OutputDelta] = []
        most = 0
        for delta in deltas:
            backlog.put(delta)
            most = max(most, len(backlog._waiting))
            if rng.random() < 0.01:
                taken += await backlog.take()  # type: ignore[arg-type]
        if backlog._waiting:
            taken += await backlog.take()  # type: ignore[arg-type]
        return taken, most

    taken, most = asyncio.run(read())
    assert most <= 2 * (answers + 2) + MAX_WAITING
    assert taken[0].media_times is not None
    assert [delta.usage is not None for delta in taken] == [False] * (len(taken) - 1) + [True]
    for index in range(answers):
        whole = join([delta for delta in deltas if delta.index == index])
        found = join([delta for delta in taken if delta.index == index])
        assert (found.text, found.token_ids, found.finish_reason) == (
            whole.text,
            whole.token_ids,
            "length",
        )


def test_what_is_no_delta_keeps_its_place() -> None:
    first = OutputDelta("it", media_times=octavo.engine.outputs.InputTimes(0, 0))
    dead = EngineDead("gone")
    events = ["admitted", first, OutputDelta("it", text="a"), OutputDelta("it", text="b"), dead]
    assert merge(events) == ["admitted", first, OutputDelta("it", text="ab"), dead]


def test_a_reader_that_sleeps_holds_no_one_up(served: Served) -> None:
    async def sleepy() -> tuple[list[int], int]:
        stream = served.engine.generate(
            {"prompt": "What is it?"}, octavo.SamplingParams(**{**LONG, "max_tokens": 300})
        )
        tokens: list[int] = []
        count = 0
        async for delta in stream:
            tokens += delta.token_ids
            count += 1
            if count == 2:
                while served.engine.engine.has_requests:  # the engine is done before this reads
                    await asyncio.sleep(0.01)
        return tokens, count

    tokens, count = served.run(sleepy())
    with Stubs(served.address) as stubs:
        expected = stubs.inference.GenerateOnce(request(max_tokens=300)).answers[0].token_ids
    assert tokens == list(expected)
    assert count < 300


def test_a_caller_that_does_not_read_holds_no_one_up(served: Served, stubs: Stubs) -> None:
    """Its stream takes no more than its window of 64 KiB; the rest gathers, put together."""
    lazy = Stubs(served.address, ("grpc.http2.bdp_probe", 0))  # which would widen the window
    asked = request(n=8, max_tokens=150)
    asked.request_id = "x" * 256  # in each delta: the window is soon full
    stream = lazy.inference.Generate(asked)
    wait_for(lambda: served.engine.engine.has_requests)
    assert stubs.inference.GenerateOnce(request()).usage.output_tokens == 12
    wait_for(lambda: not served.engine.engine.has_requests, 100)
    deltas = list(stream)
    assert len(deltas) < 8 * 150 * 0.8, "nothing was put together"
    expected = stubs.inference.GenerateOnce(request(max_tokens=150)).answers[0]
    for index in range(8):
        parts = [delta for delta in deltas if delta.index == index]
        assert [t for part in parts for t in part.token_ids] == list(expected.token_ids)
        assert "".join(part.text for part in parts) == expected.text
    assert deltas[-1].usage.output_tokens == 8 * 150
    lazy.channel.close()


# Random and mutated bytes.

METHODS = [
    ("Inference/Generate", True),
    ("Inference/GenerateOnce", False),
    ("Inference/Abort", False),
    ("Inference/Tokenize", False),
    ("Inference/Detokenize", False),
    ("Control/Abort", False),
    ("Control/GetLoad", False),
    ("Control/GetModelInfo", False),
    ("Control/GetServerInfo", False),
]


def seeds() -> list[bytes]:
    item = pb.MediaItem(kind=pb.MEDIA_KIND_VIDEO, frames=pb.Frames(data=[b"x", b"y"]))
    sampling = pb.SamplingParams(max_tokens=2, stop=["a"], n=2, top_p=0.5, seed=3)
    messages = [
        request(max_tokens=2),
        seen(),
        pb.GenerateRequest(conversation=talk(pb.ContentPart(media=item)), sampling=sampling),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=sampling, priority=3),
        pb.TokenizeRequest(conversation=talk(pb.ContentPart(text="hi")), plain=True),
        pb.DetokenizeRequest(ids=[1, 2, 3]),
        pb.AbortRequest(request_id="nobody"),
    ]
    return [message.SerializeToString() for message in messages]


def spoilt(rng: random.Random, known: list[bytes]) -> bytes:
    if rng.random() < 0.3:
        return rng.randbytes(rng.randrange(60))
    data = bytearray(rng.choice(known))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(max(1, min(len(data), rng.choice([16, 80, len(data)]))))
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            data[at:at] = rng.choice(known)[: rng.randrange(64)]
    return bytes(data)


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_random_and_mutated_bytes_never_stop_it(served: Served, count: int) -> None:
    rng = random.Random(count)
    known = seeds()
    codes: dict[str, int] = {}
    with Stubs(served.address) as stubs:
        for number in range(count):
            method, streams = rng.choice(METHODS)
            path, data = f"/octavo.v1.{method}", spoilt(rng, known)
            make = stubs.channel.unary_stream if streams else stubs.channel.unary_unary
            try:
                found = make(path)(data, timeout=2)
                list(found) if streams else None
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
                text = error.details() or ""
                assert code in RETRYABLE and code != "INTERNAL", (number, method, data, text)
                assert not re.search(r"Traceback|google\.protobuf|<class|0x[0-9a-f]{6}", text)
            codes[code] = codes.get(code, 0) + 1
        assert {"OK", "INVALID_ARGUMENT"} <= codes.keys(), codes
        assert stubs.inference.GenerateOnce(request()).usage.output_tokens == 12
    served.wait_empty()


# The page.


def test_the_api_page_is_current() -> None:
    page = make_docs.api_page((ROOT / "proto/octavo.proto").read_text())
    assert (ROOT / "docs/api.md").read_text() == page, "python proto/make_docs.py > docs/api.md"
    for kind in (pb.DESCRIPTOR.message_types_by_name, pb.DESCRIPTOR.services_by_name):
        for name in kind:
            assert re.search(rf"^## `(message|service) {name}`$", page, re.M)
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            assert re.search(rf"^\| `{field.name}` \|.*\| {field.number} \|", page, re.M)
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            assert f"`{method.name}({method.input_type.name}) → " in page


# The client's calls that are answered with one message.


def test_the_clients_unary_calls_are_the_stubs(served: Served, stubs: Stubs) -> None:
    messages = [{"role": "user", "content": "What is it?"}]
    with octavo.Client(served.address) as client:
        ids = client.tokenize("What is it?")
        assert ids == tuple(stubs.inference.Tokenize(pb.TokenizeRequest(text="What is it?")).ids)
        assert client.detokenize(ids) == "What is it?"
        assert len(client.tokenize("<|im_end|>")) == 1 < len(client.tokenize("<|im_end|>", True))
        assert client.detokenize(client.tokenize("<|im_end|>"), skip_special_tokens=True) == ""
        for prompt in ("What is it?", ids):
            reply = client.generate_once(prompt, n=2, **GREEDY)
            assert [answer.index for answer in reply.answers] == [0, 1]
            streamed = list(client.generate(prompt, **GREEDY))
            assert reply.answers[0].text == "".join(delta.text for delta in streamed)
            assert reply.usage.output_tokens == 24 and reply.answers[1].finish_reason == "length"
        reply = client.generate_once(messages, request_id="me", **GREEDY)
        same = client.generate_once(messages, octavo.SamplingParams(**GREEDY), request_id="me")
        assert same.answers[0].text == reply.answers[0].text
        assert reply.request_id == "me"
        assert reply.answers[0].text == "".join(d.text for d in client.chat(messages, **GREEDY))
        assert len(client.tokenize(messages)) == reply.usage.prompt_tokens
        assert client.model_info() == stubs.control.GetModelInfo(pb.GetModelInfoRequest())
        assert client.server_info().settings == (
            stubs.control.GetServerInfo(pb.GetServerInfoRequest()).settings
        )
        assert client.load().num_blocks == served.engine.engine.num_blocks
        assert not client.abort("nobody")
        assert client.health() == client.health("octavo.v1.Inference") == "SERVING"
        with pytest.raises(ClientError, match="NOT_FOUND"):
            client.health("octavo.v1.Nothing")
    with pytest.raises(ClientError, match="closed"):
        client.load()


def test_the_client_takes_sampling_params_as_llm_does(served: Served) -> None:
    """Each field as if it were given by itself; once."""
    more: dict[str, Any] = {"logit_bias": {5: -2.0}, "bad_words": ["x"], "stop": ["y"], "n": 2}
    more |= {"structured": octavo.StructuredOutput(regex="[a-z]+"), "logprobs": 2, "seed": 3}
    params = octavo.SamplingParams(**more)
    alone, together = pb.GenerateRequest(), pb.GenerateRequest()
    fill(alone, None, None, {**more, "priority": 3})
    fill(together, None, None, with_params(params, {"priority": 3}))
    for request in (alone, together):
        assert read_sampling(request.sampling) == params and request.priority == 3
    with octavo.Client(served.address) as client:
        for wrong, settings, field in ((params, {"n": 1}, "n"), ({"n": 1}, {}, "params")):
            with pytest.raises(ClientError, match="INVALID_ARGUMENT") as refused:
                list(client.chat([{"role": "user", "content": "a"}], wrong, **settings))  # type: ignore[arg-type]
            assert refused.value.field == field


def test_the_client_drains(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo.server")
    with served.another() as address, octavo.Client(address) as client:
        assert [client.drain(5.0), client.drain()] == [0, 0]
        assert [line for line in caplog.messages if "Control.Drain" in line] == [
            "Control.Drain: rejecting new requests; 0 in flight"
        ]
        assert client.health() == "NOT_SERVING" and client.load().is_draining
        with pytest.raises(ClientError, match="UNAVAILABLE: the server is draining"):
            client.generate_once("What is it?", **GREEDY)


def test_the_clients_errors_keep_the_place(served: Served) -> None:
    """Of what it refuses itself, and of what the server does."""

    def field_of(prompt: Any, **settings: Any) -> str:
        with pytest.raises(ClientError) as refused:
            client.generate_once(prompt, **{**GREEDY, **settings})
        assert refused.value.code == "INVALID_ARGUMENT"
        return refused.value.field

    text = {"type": "text", "text": "What is it?"}
    with octavo.Client(served.address) as client:
        for part, field in (
            ({"type": "image", "image": "/no/such.png"}, ".content[2]"),
            ({"type": "image", "path": "/a.png"}, ".content[2]"),
            ({"type": "audio"}, ".content[2]"),
            ({"type": "text", "text": 5}, ".content[2].text"),
            ({"type": "text", "txt": "hi"}, ".content[2]"),
            ({"type": "image", "image": b"no image"}, ".content[2].image"),
        ):
            found = field_of([{"role": "user", "content": [text, text, part]}])
            assert found == f"messages[0]{field}", part  # whoever found it
        assert field_of([{"role": "user", "content": "x"}, {"rôle": "user"}]) == "messages[1]"
        with pytest.raises(ClientError, match="put the image itself under 'image'"):
            client.generate_once([{"role": "user", "content": [{"type": "image", "path": "a"}]}])
        assert field_of("x", images=["/no/such.png"]) == "images[0]"
        assert field_of("x", temperature=-1) == "temperature"
        assert field_of("x", temperatur=0) == "temperatur"
        assert field_of("x", structured={"regex": "a"}) == "structured"
        with pytest.raises(ClientError) as streamed:
            list(client.generate("x", temperature=-1))
        assert streamed.value.field == "temperature"
