"""`octavo serve` as users meet it: a process of its own, gRPC from outside, ends and errors."""

from __future__ import annotations

import concurrent.futures
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import SETTINGS, Served, Server, alive, start, wait_for
from octavo.engine.client.client import ClientError
from octavo.engine.server.errors import STOPPED
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
LONG = {**GREEDY, "max_tokens": 900}
LISTS = ("stop", "stop_token_ids", "bad_words", "logit_bias")  # empty is none


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    server = start(checkpoint)
    yield server
    assert server.end() == 0, server.text()
    assert server.process.stdout is not None
    assert server.process.stdout.read() == "", "more than the ready line on stdout"


@pytest.fixture
def client(server: Server) -> Iterator[octavo.Client]:
    with octavo.Client(server.address) as client:
        yield client


def picture(seed: int = 1) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8))


def ask(text: str = "What is it?", *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def tokens(client: octavo.Client, messages: Any, **more: Any) -> list[int]:
    return [t for d in client.chat(messages, **{**GREEDY, **more}) for t in d.token_ids]


def test_answers_are_the_librarys(checkpoint: Path, client: octavo.Client, tmp_path: Path) -> None:
    """Every source of the client gives what `octavo.LLM` gives; deltas add up."""
    path = tmp_path / "a picture.png"
    picture().save(path)
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    sources = [str(path), path, f"file://{str(path).replace(' ', '%20')}", buffer.getvalue()]
    sources.append(picture())
    params = octavo.SamplingParams(**GREEDY)
    video = {"type": "video", "video": [picture(i) for i in range(4)], "max_pixels": 6272}
    with octavo.LLM(checkpoint, dtype="float32", max_model_len=1024) as llm:
        image, moving = (
            llm.chat(ask("?", part), params)[0].outputs[0]
            for part in ({"type": "image", "image": picture()}, video)
        )
    for source in sources:
        assert tokens(client, ask("?", {"type": "image", "image": source})) == image.token_ids
    assert tokens(client, ask("?", {"type": "image"}), images=[picture()]) == image.token_ids
    deltas = list(client.chat(ask("?", video), **GREEDY))
    assert "".join(delta.text for delta in deltas) == moving.text
    assert [t for delta in deltas for t in delta.token_ids] == moving.token_ids
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert deltas[-1].usage is not None and deltas[-1].usage.output_tokens == 12
    assert (deltas[0].media[0].num_frames, list(deltas[0].media[0].frame_indices)) == (
        4,
        [0, 1, 2, 3],
    )


def test_many_clients_at_once(client: octavo.Client) -> None:
    conversations = [
        ask(f"Question {i}?", {"type": "image", "image": picture(i)}) for i in range(8)
    ]
    alone = [tokens(client, messages) for messages in conversations]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda m: tokens(client, m), conversations)) == alone


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(
    ("messages", "sampling", "words"),
    [
        ([], {}, "messages"),
        (ask("?", {"type": "image", "image": b"junk"}), {}, "not a supported image"),
        (ask("?", {"type": "image"}), {}, "images="),
        (ask("?", {"type": "image", "image": "http://a.b/c.png"}), {}, "--allow-media-domains"),
        (ask("?", {"type": "image", "image": b"x", "max_pixels": -1}), {}, "max_pixels"),
        (
            ask("?", {"type": "image", "image": b"x", "max_pixel": 1}),
            {},
            "max_pixel: unknown option",
        ),
        (ask("?", {"type": "image", "image": "/no/such"}), {}, "No such file"),
        (ask("?", {"type": "video", "video": b"junk"}), {}, "MP4"),
        (ask("x" * 3000), {}, "max_model_len=1024"),
        ([{"role": "robot", "content": "x"}], {}, "system, developer, user, assistant"),
        ([{"role": "user", "content": ""}], {}, "is empty"),
        (ask(), {"temperature": -1.0}, "temperature=-1.0"),
        (ask(), {"temperature": float("nan")}, "temperature"),
        (ask(), {"top_p": 0.0}, "top_p"),
        (ask(), {"max_tokens": 0}, "max_tokens"),
        (ask(), {"stop": ["x"] * 100}, "stop"),
        (ask(), {"stop": ["y" * 1000]}, "stop"),
        (ask(), {"best_of": 3}, "best_of: unknown"),
        (ask(), {"stop": ["y" * 20_000]}, "stop"),
        ([{"role": "r" * 20_000, "content": "x"}], {}, "system, developer, user, assistant"),
        ([{"role": "user", "content": "x", "nick": "y"}], {}, "'nick' is unknown"),
        ([{"role": "user", "content": ["x"]}], {}, "must be a dict"),
        (ask("\ud800"), {}, "messages"),
        (ask("?", {"type": "image", "image": picture(), "min_pixels": 1 << 40}), {}, "max_pixels"),
        (ask(), {"request_id": "x" * 300}, "request_id"),
        (ask(), {"request_id": 3}, "request_id: 3: must be a string"),
        (ask(), {"n": "x"}, "n='x': must be an integer"),
        (ask(), {"max_tokens": 2.5}, "max_tokens=2.5: must be an integer"),
        (ask(), {"timeout_s": "x"}, "timeout_s='x': must be a finite number"),
        (ask(), {"stop": 3}, "stop=3: must be a list"),
        (ask(), {"seed": -2}, "seed=-2: must be from 0"),
        (ask(), {"logit_bias": [1]}, "logit_bias=[1]: must be a dict"),
        ([{"role": "user", "content": 3}], {}, "messages[0].content: must be a string or a list"),
        ([{"role": 3, "content": "x"}], {}, "messages[0].role: 3: must be a string"),
    ],
)
def test_unbounded_n_bad_input_is_rejected_clearly(
    client: octavo.Client, messages: Any, sampling: dict[str, Any], words: str
) -> None:
    with pytest.raises(ClientError, match=re.escape(words)) as refused:
        list(client.chat(messages, **sampling))
    assert refused.value.code == "INVALID_ARGUMENT"
    assert len(tokens(client, ask())) == 12  # the others go on


@pytest.mark.lesson("L21")
def test_local_files(server: Server, tmp_path: Path) -> None:
    """A path in the message itself is never opened by the server."""
    path = tmp_path / "secret.png"
    picture().save(path)
    with grpc.insecure_channel(server.address) as channel:
        stub = octavo_pb2_grpc.InferenceStub(channel)
        for url in (str(path), f"file://{path}", "/etc/passwd"):
            item = pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE, url=url)
            parts = [pb.ContentPart(media=item)]
            talk = pb.Conversation(messages=[pb.Message(role="user", content=parts)])
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Generate(pb.GenerateRequest(conversation=talk)))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "reading files" in refused.value.details()


@pytest.mark.lesson("L16")
@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(),
        pb.GenerateRequest(text="x", media=[pb.MediaItem()]),
        pb.GenerateRequest(conversation=pb.Conversation(messages=[pb.Message(role="user")])),
        pb.GenerateRequest(
            conversation=pb.Conversation(
                messages=[pb.Message(role="user", content=[pb.ContentPart()])]
            )
        ),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[269])),
        pb.GenerateRequest(text="x", sampling=pb.SamplingParams(seed=2**64 - 1)),
    ],
    ids=str,
)
def test_client_assert_odd_messages(server: Server, request_: pb.GenerateRequest) -> None:
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            list(octavo_pb2_grpc.InferenceStub(channel).Generate(request_))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value


@pytest.mark.lesson("L30")
def test_proto_defaults(client: octavo.Client) -> None:
    """An absent field is the checkpoint's; zero is the caller's zero."""
    for name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        field = pb.SamplingParams.DESCRIPTOR.fields_by_name[name]
        assert field.has_presence or name in LISTS
    wild = {"temperature": 5.0, "top_p": 1.0, "max_tokens": 12, "ignore_eos": True}

    def draws(**sampling: Any) -> set[tuple[int, ...]]:
        return {
            tuple(t for d in client.chat(ask(), seed=i, **sampling) for t in d.token_ids)
            for i in range(5)
        }

    assert len(draws(**wild)) == 1  # top_k 1, of the checkpoint's generation_config.json
    assert len(draws(**wild, top_k=0)) == 5  # zero is the caller's choice: no limit
    assert len(draws(**{**wild, "temperature": 0.0}, top_k=0)) == 1


@pytest.mark.lesson("L31")
def test_message_size(client: octavo.Client) -> None:
    """A picture of well over gRPC's default of 4 MiB."""
    pixels = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    assert len(buffer.getvalue()) > 7 << 20
    part = {"type": "image", "image": buffer.getvalue(), "max_pixels": 50176}
    assert len(tokens(client, ask("?", part))) == 12


def test_abort_by_name(client: octavo.Client) -> None:
    stream = client.chat(ask(), request_id="mine", **LONG)
    next(stream)
    with pytest.raises(ClientError) as refused:
        list(client.chat(ask(), request_id="mine", **GREEDY))
    assert refused.value.code == "ALREADY_EXISTS"
    assert client.abort("mine")
    assert [delta.finish_reason for delta in stream][-1] == "abort"
    assert not client.abort("mine")
    assert len(tokens(client, ask(), request_id="mine")) == 12  # the name is free again


def test_a_name_used_again_at_once_gets_its_own_answer(client: octavo.Client) -> None:
    """Nothing of the request that had the name before, and left in the middle, reaches it."""
    image = {"type": "image", "image": picture(7)}
    expected = tokens(client, ask("Another?", image))
    for _ in range(10):
        stream = client.chat(ask(), request_id="again", **LONG)
        next(stream)
        stream.close()
        for _ in range(50):  # until the server has seen that the stream was closed
            try:
                assert tokens(client, ask("Another?", image), request_id="again") == expected
                break
            except ClientError as error:
                assert error.code == "ALREADY_EXISTS"
        else:
            raise AssertionError("the name was never free again")


def test_a_client_that_leaves_frees_its_request(checkpoint: Path) -> None:
    """With one request at a time, the next one's answer shows that the first is gone."""
    settings = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 4_000_000}
    served = Served(checkpoint, max_num_seqs=1, **settings)
    with octavo.Client(served.address) as client:
        for stream in [client.chat(ask(), **LONG) for _ in range(5)]:
            next(stream)
            stream.close()
        started = time.monotonic()
        assert len(tokens(client, ask())) == 12
        once = time.monotonic() - started
        started = time.monotonic()
        list(client.chat(ask(), **LONG))
        assert once < time.monotonic() - started  # less than one abandoned answer would take
        with pytest.raises(ClientError, match="DEADLINE_EXCEEDED"):
            list(client.chat(ask(), timeout=0.05, **LONG))
        assert len(tokens(client, ask())) == 12
    served.wait_empty()
    served.close()


def test_health(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "octavo.v1.Inference"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_stopping_does_not_wait_for_a_health_watch(checkpoint: Path) -> None:
    server = start(checkpoint)
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        started = time.monotonic()
        assert (
            server.end(signal.SIGINT) == 0
        )  # at once after the ready line: its handler stands by then
        assert time.monotonic() - started < 8  # less than the grace for running requests
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_sigterm_to_all_processes_lets_requests_finish(checkpoint: Path) -> None:
    """As systemd sends it: workers leave it to the engine. (To the server alone: test_http.py.)"""
    server = start(checkpoint)
    with octavo.Client(server.address) as client:
        stream = client.chat(ask(), **LONG)
        next(stream)
        for pid in (*server.worker_pids, server.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert [delta.finish_reason for delta in stream][-1] == "length"
    assert server.process.wait(30) == 0
    wait_for(lambda: not any(map(alive, server.worker_pids)))


def test_past_max_restarts_a_worker_that_dies_while_nothing_runs_ends_the_server(
    checkpoint: Path,
) -> None:
    server = start(checkpoint, "--max-restarts", "0")
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(server.worker_pids[0], signal.SIGKILL)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.process.wait(30) == 1
    assert "signal 9" in server.text()


@pytest.mark.lesson("L18")
def test_exif_alpha_a_pil_image_arrives_upright(client: octavo.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", exif=exif)
    image = Image.open(buffer)
    cmyk = picture().convert("CMYK")
    for source, shape in ((image, (84, 56)), (cmyk, (56, 84))):
        messages = ask("?", {"type": "image", "image": source, "min_pixels": 3136})
        media = next(client.chat(messages, **GREEDY)).media[0]
        assert (media.height, media.width) == shape


def test_prompts_that_cannot_travel_are_rejected(server: Server) -> None:
    client = octavo.Client(server.address)
    for prompt in ([-1], None, "\ud800"):
        with pytest.raises(ClientError, match="INVALID_ARGUMENT"):
            list(client.generate(prompt))  # type: ignore[arg-type]
    part = {"image": picture(), "max_pixels": 12544}
    assert next(client.chat(ask("?", {"type": "image"}), images=[part], **GREEDY)).media
    client.close()
    with pytest.raises(ClientError, match="closed"):
        list(client.chat(ask()))


# Rank 0's twin is the test of a worker that dies while nothing runs.
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_past_max_restarts_a_dead_worker_is_unavailable_for_all_and_ends_the_server(
    checkpoint: Path, rank: int
) -> None:
    server = start(checkpoint, "--tensor-parallel-size", "2", "--max-restarts", "0")
    errors: list[ClientError] = []
    begun = threading.Barrier(4)

    def talk(client: octavo.Client) -> None:
        stream = client.chat(ask(), **LONG)
        next(stream)
        begun.wait(30)
        try:
            list(stream)
        except ClientError as error:
            errors.append(error)

    with octavo.Client(server.address) as client:
        threads = [threading.Thread(target=talk, args=(client,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait(30)
        os.kill(server.worker_pids[rank], signal.SIGKILL)
        for thread in threads:
            thread.join(30)
    assert [error.code for error in errors] == ["UNAVAILABLE"] * 3
    assert {error.text for error in errors} == {STOPPED.message}
    assert server.process.wait(30) == 1
    assert re.search(rf"rank {rank} .* was killed by signal 9", server.text())
    wait_for(lambda: not any(map(alive, server.worker_pids)))


def test_workers_die_with_a_server_that_is_killed(checkpoint: Path) -> None:
    server = start(checkpoint)
    assert server.end(signal.SIGKILL) == -9
    wait_for(lambda: not any(map(alive, server.worker_pids)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "/no/such"], "/no/such: no such folder"),
        (["--host", "203.0.113.7"], "203.0.113.7"),
        (["--max-model-len", "100000"], "max_model_len=100000"),
        # Of settings: engine/test_llm.py has them in one process.
        pytest.param(["--tensor-parallel-size", "3"], "1, 2, 4", marks=pytest.mark.slow),
        pytest.param(["--dtype", "int3"], "int3", marks=pytest.mark.slow),
        pytest.param(["--max-num-seqs", "0"], "max_num_seqs=0", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_cannot_start_says_why(
    checkpoint: Path, options: list[str], words: str
) -> None:
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--port", "0"]
    settings = ["--model", str(checkpoint), *SETTINGS, *options]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_an_error(server: Server, checkpoint: Path) -> None:
    port = server.address.split(":")[1]
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--port", port]
    settings = ["--model", str(checkpoint), *SETTINGS]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert port in done.stderr.splitlines()[-1]


def test_no_server_is_unavailable() -> None:
    with octavo.Client("127.0.0.1:1") as client, pytest.raises(ClientError, match="UNAVAILABLE"):
        list(client.chat(ask()))


def test_the_client_needs_no_torch() -> None:
    code = "import sys, octavo; octavo.Client; print([m for m in sys.modules if 'torch' in m])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
