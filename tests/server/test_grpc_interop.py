"""gRPC's interop cases beyond test_grpc_service.py's, and lessons L31 and L32 over the wire."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served
from octavo.engine.server.grpc_api import server
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

SAMPLING = pb.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
ODD = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"  # gRPC's own example
GZIP = grpc.Compression.Gzip
LIMIT = server.MAX_MESSAGE_BYTES


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


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address) as channel:
        yield channel


def answer(channel: grpc.Channel, text: str = "What is it?", **options: Any) -> list[int]:
    stub = octavo_pb2_grpc.InferenceStub(channel)
    asked = pb.GenerateRequest(text=text, sampling=SAMPLING)
    return [t for delta in stub.Generate(asked, **options) for t in delta.token_ids]


def code_and_text(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), refused.value.details()


def test_empty_messages(channel: grpc.Channel) -> None:
    """Each way: nothing is asked, and nothing is answered."""
    load = channel.unary_unary("/octavo.v1.Control/GetLoad")(b"")
    assert pb.Load.FromString(load).num_blocks > 0
    asked = pb.TokenizeRequest(text="").SerializeToString()
    assert channel.unary_unary("/octavo.v1.Inference/Tokenize")(asked) == b""


def test_a_status_with_whitespace_and_unicode(channel: grpc.Channel) -> None:
    stub = octavo_pb2_grpc.InferenceStub(channel)
    for model, told in ((ODD, ("☺", "😈")), ("größe 東京", ("größe 東京",))):
        asked = pb.GenerateRequest(text="x", model=model)
        code, text = code_and_text(lambda asked=asked: stub.GenerateOnce(asked))
        assert code is grpc.StatusCode.NOT_FOUND
        assert all(each in text for each in told), text


def test_compressed_requests(served: Served, channel: grpc.Channel) -> None:
    expected = answer(channel)
    assert len(expected) == 6
    assert answer(channel, compression=GZIP) == expected
    with grpc.insecure_channel(served.address, compression=GZIP) as compressed:
        assert answer(compressed) == expected
        stub = octavo_pb2_grpc.InferenceStub(compressed)
        long = pb.TokenizeRequest(text="many words " * 80)
        plain = octavo_pb2_grpc.InferenceStub(channel).Tokenize(long)
        assert stub.Tokenize(long) == plain and len(plain.ids) > 100


def test_a_message_of_64_mib(channel: grpc.Channel) -> None:
    """It is received whole before its texts are counted."""
    asked = pb.GenerateRequest(text="x" * (64 << 20), sampling=SAMPLING)
    stub = octavo_pb2_grpc.InferenceStub(channel)
    code, text = code_and_text(lambda: stub.GenerateOnce(asked))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "bytes of text" in text and len(text) < 1000


@pytest.mark.slow
def test_a_small_message_that_unpacks_beyond_the_limit(served: Served) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(served.address, options=options, compression=GZIP) as channel:
        call = channel.unary_unary("/octavo.v1.Inference/GenerateOnce")
        code, _ = code_and_text(lambda: call(bytes(LIMIT + 1)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(answer(channel)) == 6


def test_ping_pong_of_many_streams(served: Served) -> None:
    """Each reader answers a delta with its next call, 50 at once, ten times."""

    async def play(stub: Any, number: int) -> list[list[int]]:
        heard: list[list[int]] = []
        for _ in range(10):
            asked = pb.GenerateRequest(text=f"Question {number % 5}?", sampling=SAMPLING)
            heard.append([t async for delta in stub.Generate(asked) for t in delta.token_ids])
        return heard

    async def all_at_once() -> list[list[list[int]]]:
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = octavo_pb2_grpc.InferenceStub(channel)
            return await asyncio.gather(*(play(stub, number) for number in range(50)))

    with grpc.insecure_channel(served.address) as channel:
        expected = [answer(channel, f"Question {number}?") for number in range(5)]
    assert asyncio.run(all_at_once()) == [[expected[n % 5]] * 10 for n in range(50)]


# Lessons.


def still_watches(address: str) -> bool:
    """Whether a stream on which nothing comes outlives a client's many pings."""
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(address, options=options) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        deadline = time.monotonic() + 6  # a server that takes offence does so after 3 s
        while watch.is_active() and time.monotonic() < deadline:
            time.sleep(0.05)
        lives = watch.is_active()
        watch.cancel()
        return lives


@pytest.mark.lesson("L31")
@pytest.mark.slow
def test_message_size_pings_while_nothing_comes_cut_no_stream_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served.another() as address:
        assert still_watches(address)
    monkeypatch.setattr(server, "OPTIONS", [])
    with served.another() as address:
        assert not still_watches(address), "gRPC's defaults would do"


@pytest.mark.lesson("L31")
def test_message_size_warm_before_serving(served: Served) -> None:
    """While the first step runs nobody is served; then all are."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    seen: list[str] = []

    async def look() -> str:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=0.3)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    class Watched:
        """The engine, which looks what callers see at two moments."""

        def __getattr__(self, name: str) -> Any:
            return getattr(served.engine, name)

        async def generate(self, *given: Any) -> AsyncIterator[Any]:
            seen.append(f"first step: {await look()}")
            async for delta in served.engine.generate(*given):
                yield delta

        async def wait_failed(self) -> str:
            seen.append(f"ready: {await look()}")
            return "it is over"

    engine: Any = Watched()
    ready: list[str] = []
    ends = server.serve(engine, "127.0.0.1", port, lambda *given: ready.append(given[0]))
    assert asyncio.run(ends) == 1
    assert seen[0] in ("first step: UNAVAILABLE", "first step: DEADLINE_EXCEEDED")
    assert seen[1:] == ["ready: SERVING"] and ready == [f"127.0.0.1:{port}"]


@pytest.mark.lesson("L32")
def test_template_code_a_client_s_text_is_only_text(
    channel: grpc.Channel, checkpoint: Path
) -> None:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        assert not any("template" in field.name for field in message.fields), message.name
    code = "{{ 7 * 191 }}{% for i in range(10**9) %}x{% endfor %}"
    part = pb.ContentPart(text=code)
    talk = pb.Conversation(messages=[pb.Message(role="user", content=[part])])
    reply = octavo_pb2_grpc.InferenceStub(channel).Tokenize(pb.TokenizeRequest(conversation=talk))
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = tokenizer.decode(list(reply.ids), skip_special_tokens=False)
    assert code in text and "1337" not in text
