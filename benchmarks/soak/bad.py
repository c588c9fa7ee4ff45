"""Requests that must be rejected, and clients that disconnect."""

from __future__ import annotations

import base64
import json
import random
import time
from typing import Any

import grpc

from octavo.proto import octavo_pb2 as pb

from .caller import Caller, read_some
from .good import ask, conversation, image_part
from .media import broken_image, broken_video

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 400, "ignore_eos": True, "stream": True}
LOST = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
TIMED_OUT = (200, 408, 504)


def _rejected(caller: Caller, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
    status, data = caller.request("POST", path, body, headers)
    assert 400 <= status < 500, f"{status} {data[:300]!r}"


def bad_fields(caller: Caller, rng: random.Random) -> None:
    wrong: list[dict[str, Any]] = [
        {"temperature": -1},
        {"n": 100_000},
        {"logprobs": "yes"},
        {f"unknown_{rng.getrandbits(30)}": 1},
        {"model": f"other-{rng.getrandbits(30)}"},
        {"max_tokens": 0},
        {"messages": "text"},
        {"messages": ask("a " * 40_000)},
        {"messages": [{"role": f"role{rng.getrandbits(20)}", "content": "x"}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
        {"structured_outputs": {"regex": f"({rng.getrandbits(20)}"}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    ]
    _rejected(caller, CHAT, {"messages": ask("Hello"), **rng.choice(wrong)})


def bad_bodies(caller: Caller, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        _rejected(caller, CHAT, b'{"messages": [' + rng.randbytes(20))
    elif kind == 1:
        _rejected(caller, CHAT, b"[" * rng.randint(1, 100_000))
    elif kind == 2:
        _rejected(caller, CHAT, json.dumps(ask("x")).encode())
    elif kind == 3:
        _rejected(caller, CHAT, {}, {**caller.headers, "content-type": "text/plain"})
    elif kind == 4:
        _rejected(caller, f"/v1/none-{rng.getrandbits(30)}", {})
    else:
        for _ in read_some(caller.raw_post(CHAT, b"", 300 << 20), 1):
            pass


def bad_http(caller: Caller, rng: random.Random) -> None:
    """Send bytes that are not HTTP."""
    with caller.open_socket() as opened:
        opened.sendall(rng.choice([b"GET / HTTP/9\r\n\r\n", rng.randbytes(300) + b"\r\n\r\n"]))
        opened.settimeout(2)
        try:
            opened.recv(1000)
        except OSError:
            return


def bad_media(caller: Caller, rng: random.Random) -> None:
    kind = rng.randrange(6)
    url = "data:image/png;base64,"
    if kind == 0:
        url += base64.b64encode(broken_image(rng, caller.media)).decode()
    elif kind == 1:
        url += "%" * rng.randint(1, 30)
    elif kind == 2:
        url = f"http://192.0.2.1/{rng.getrandbits(30)}.png"
    elif kind == 3:
        url = rng.choice(["file:///etc/passwd", f"file://{caller.media.folder}/none.png"])
    else:
        data = base64.b64encode(broken_video(rng, caller.media)).decode()
        part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
        _rejected(caller, CHAT, {"messages": ask("What?", part)})
        return
    _rejected(caller, CHAT, {"messages": ask("What?", image_part(url))})


def bad_keys(caller: Caller, rng: random.Random) -> None:
    wrong = f"wrong-key-{rng.getrandbits(40)}"
    headers = {"authorization": f"Bearer {wrong}", "content-type": "application/json"}
    _rejected(caller, CHAT, {"messages": ask("Hello")}, headers)
    try:
        call = caller.control.GetLoad
        call(pb.GetLoadRequest(), timeout=30, metadata=(("authorization", f"Bearer {wrong}"),))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED, error
    else:
        raise AssertionError("an invalid key was accepted")


def bad_grpc(caller: Caller, rng: random.Random) -> None:
    image = pb.MEDIA_KIND_IMAGE
    asked = pb.GenerateRequest(conversation=conversation("Hello"))
    kind = rng.randrange(6)
    if kind == 0:
        asked.sampling.temperature = -1
    elif kind == 1:
        item = pb.MediaItem(kind=image, data=broken_image(rng, caller.media))
        asked.conversation.CopyFrom(conversation("What?", item))
    elif kind == 2:
        asked.model = f"other-{rng.getrandbits(30)}"
    elif kind == 3:
        asked.token_ids.ids.append(1 << 30)
    elif kind == 4:
        pixels = pb.Pixels(data=b"123", shape=[1, 2, 3])
        asked.conversation.CopyFrom(conversation("What?", pb.MediaItem(kind=image, pixels=pixels)))
    path = "/octavo.v1.Inference/GenerateOnce"
    data = rng.randbytes(50) if kind == 5 else asked.SerializeToString()
    try:
        caller.channel.unary_unary(path)(data, timeout=60, metadata=caller.metadata)
    except grpc.RpcError as error:
        assert error.code() not in LOST, error
    else:
        raise AssertionError("an invalid request was answered")


def leave_upload(caller: Caller, rng: random.Random) -> None:
    """Close the connection in the middle of the body or the headers."""
    body = json.dumps({"messages": ask("Hello " * 2000)}).encode()
    if rng.random() < 0.5:
        opened = caller.raw_post(CHAT, body[: rng.randint(0, len(body) - 1)], len(body))
    else:
        opened = caller.open_socket()
        opened.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a")
    time.sleep(rng.random() * 0.2)
    opened.close()


def leave_stream(caller: Caller, rng: random.Random) -> None:
    """Read part of a long answer and disconnect."""
    body = {"messages": ask("Who are you?"), **LONG}
    if rng.random() < 0.3:
        body["stream"] = False
    opened = caller.raw_post(CHAT, json.dumps(body).encode())
    if body["stream"]:
        for _ in read_some(opened, rng.randint(1, 4000)):
            pass
    else:
        time.sleep(rng.random() * 0.1)
        opened.close()


def leave_media(caller: Caller, rng: random.Random) -> None:
    """Disconnect while the video or image is decoded."""
    if rng.random() < 0.5:
        url = rng.choice(caller.media.videos).data_uri
        part: dict[str, Any] = {"type": "video_url", "video_url": {"url": url}}
    else:
        part = image_part(rng.choice(caller.media.images).data_uri)
    body = {"messages": ask(f"What {rng.random()}?", part), **LONG}
    opened = caller.raw_post(CHAT, json.dumps(body).encode())
    time.sleep(rng.random() * 0.08)
    opened.close()


def leave_in_time(caller: Caller, rng: random.Random) -> None:
    """Send a request with a timeout that is too short."""
    seconds = rng.choice([0.001, 0.01, 0.05, 0.2])
    body = {**LONG, "messages": ask("Who are you?"), "timeout_s": seconds, "stream": False}
    status, data = caller.request("POST", CHAT, body)
    assert status in TIMED_OUT, f"{status} {data[:200]!r}"


def leave_grpc(caller: Caller, rng: random.Random) -> None:
    """Cancel a call, let it time out, or abort it by its id."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    asked = pb.GenerateRequest(conversation=conversation("Who are you?"), sampling=sampling)
    asked.request_id = f"soak-{rng.getrandbits(60)}"
    kind = rng.randrange(4)
    if kind == 3:
        item = pb.MediaItem(kind=pb.MEDIA_KIND_VIDEO, data=rng.choice(caller.media.videos).data)
        asked.conversation.CopyFrom(conversation(f"What {rng.random()}?", item))
    call = caller.stream(asked, timeout=rng.choice([0.02, 0.1]) if kind == 0 else 60.0)
    try:
        if kind == 3:
            time.sleep(rng.random() * 0.08)
            call.cancel()
        for number, delta in enumerate(call):
            if kind == 1 and number == rng.randrange(10):
                call.cancel()
            if kind == 2 and number == 0:
                caller.call(caller.inference.Abort, pb.AbortRequest(request_id=asked.request_id))
            last = delta
        if kind == 2:
            assert last.finish_reason in (pb.FINISH_REASON_ABORT, pb.FINISH_REASON_LENGTH), last
    except grpc.RpcError as error:
        ended = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert error.code() in ended, error
