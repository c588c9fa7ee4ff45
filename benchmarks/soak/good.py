"""Requests that must succeed, with deterministic answers."""

from __future__ import annotations

import json
import random
from typing import Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo.proto import octavo_pb2 as pb

from .caller import Caller
from .media import SIZES, draw_image

QUESTIONS = (
    "What is in the picture?",
    "What color is the shape?",
    "Which shape is it?",
    "How many shapes are there?",
    "Who are you?",
)
STORY = "The red circle is left of the blue star, and nothing else is to be seen here. "


def ask(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(caller: Caller, messages: Any, **more: Any) -> None:
    """Send a chat, unary or streaming; both must give the same answer."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, **more}
    request = json.dumps(body)
    if caller.rng.random() < 0.5:
        choices = caller.post("/v1/chat/completions", body)["choices"]
        answer = {each["index"]: _content(each["message"]) for each in choices}
        ends = {each["index"]: each["finish_reason"] for each in choices}
    else:
        answer, ends = _streamed(caller.events("/v1/chat/completions", body))
    assert set(ends) == set(range(body.get("n", 1))) and all(ends.values()), ends
    caller.answers.check(request, (answer, ends))


def _content(message: dict[str, Any]) -> str:
    calls = [each["function"] for each in message.get("tool_calls") or ()]
    return (message.get("content") or "") + (json.dumps(calls) if calls else "")


def _streamed(events: list[Any]) -> tuple[dict[int, str], dict[int, str]]:
    answer: dict[int, str] = {}
    calls: dict[int, list[Any]] = {}
    ends: dict[int, str] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        index, delta = choice["index"], choice["delta"]
        answer[index] = answer.get(index, "") + (delta.get("content") or "")
        calls.setdefault(index, []).extend(delta.get("tool_calls") or ())
        if choice["finish_reason"]:
            ends[index] = choice["finish_reason"]
    for index, found in calls.items():
        if found:
            functions = [each["function"] for each in found]
            answer[index] += json.dumps(functions)
    return answer, ends


def chat_text(caller: Caller, rng: random.Random) -> None:
    chat(caller, ask(rng.choice(QUESTIONS)), max_tokens=rng.choice([4, 12, 40]), ignore_eos=True)


def chat_image(caller: Caller, rng: random.Random) -> None:
    files = rng.sample(caller.media.images, rng.choice([1, 1, 1, 2]))
    by_path = rng.random() < 0.3
    urls = [f"file://{caller.media.folder / f.name}" if by_path else f.data_uri for f in files]
    chat(caller, ask(rng.choice(QUESTIONS), *map(image_part, urls)))


def chat_new_image(caller: Caller, rng: random.Random) -> None:
    """Send a new image twice: once to encode it, once for a cache hit."""
    url = draw_image(rng, rng.choice(SIZES)).data_uri
    for _ in range(2):
        chat(caller, ask("Which shape is it?", image_part(url)))


def chat_video(caller: Caller, rng: random.Random) -> None:
    video = rng.choice(caller.media.videos)
    source: Any = video.data_uri
    if rng.random() < 0.3:
        source = f"file://{caller.media.folder / video.name}"
    elif rng.random() < 0.3:
        frames = [file for file in caller.media.images if file.name.startswith("160x120")]
        source = [file.data_uri for file in frames]
    part = {"type": "video_url", "video_url": {"url": source}}
    chat(caller, ask("Which way does it move?", part))


def chat_options(caller: Caller, rng: random.Random) -> None:
    """Use several samples, log probabilities, penalties, stop strings."""
    more: dict[str, Any] = rng.choice(
        [
            {"n": 3},
            {"logprobs": True, "top_logprobs": 5},
            {"frequency_penalty": 0.5, "presence_penalty": 0.5},
            {"stop": ["e", "zz"]},
            {"logit_bias": {"100": 5}, "min_tokens": 3},
            {"priority": 2, "timeout_s": 60, "cache_salt": f"salt{rng.randrange(5)}"},
        ]
    )
    chat(caller, ask(rng.choice(QUESTIONS)), **more)


def chat_schema(caller: Caller, rng: random.Random) -> None:
    """Use a schema that was used before, or a new one."""
    number = rng.randrange(4) if rng.random() < 0.5 else rng.getrandbits(40)
    name = f"key_{number}"
    colors = ["red", "green", "blue", f"shade {number % 1000}"]
    schema = {
        "type": "object",
        "properties": {name: {"enum": colors}, "size": {"type": "integer"}},
        "required": [name],
        "additionalProperties": False,
    }
    formats = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": ask("Describe it."), "temperature": 0, "max_tokens": 120}
    found = caller.post("/v1/chat/completions", {**body, "response_format": formats})
    choice = found["choices"][0]
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["message"]["content"])[name] in colors, choice
    chat(caller, ask("Pick."), structured_outputs={"regex": f"[ab]{{3}}{number % 50}"})


def chat_tools(caller: Caller, rng: random.Random) -> None:
    function = {
        "name": f"paint_{rng.randrange(3)}",
        "parameters": {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}},
    }
    choice = rng.choice(
        ["auto", "none", {"type": "function", "function": {"name": function["name"]}}]
    )
    tools = [{"type": "function", "function": function}]
    chat(caller, ask("Paint it."), tools=tools, tool_choice=choice, max_tokens=60)


def chat_turns(caller: Caller, rng: random.Random) -> None:
    """Run a conversation whose turns share a prefix."""
    messages = ask(f"Hello number {rng.getrandbits(30)}.")
    for turn in range(3):
        chat(caller, messages, max_tokens=6)
        messages = [*messages, {"role": "assistant", "content": f"I see {turn}."}]
        messages += ask(rng.choice(QUESTIONS))


def completions(caller: Caller, rng: random.Random) -> None:
    prompts: Any = STORY * rng.choice([1, 2, 60])
    if rng.random() < 0.3:
        prompts = [prompts[:200], STORY, "One"]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 8}
    if rng.random() < 0.3:
        body |= {"logprobs": 3}
    choices = caller.post("/v1/completions", body)["choices"]
    caller.answers.check(json.dumps(body), [each["text"] for each in choices])


def tokens(caller: Caller, rng: random.Random) -> None:
    text = STORY[: rng.randint(1, 70)] + str(rng.getrandbits(20))
    ids = caller.post("/tokenize", {"prompt": text})["tokens"]
    assert caller.post("/detokenize", {"tokens": ids})["prompt"] == text
    reply = caller.call(caller.inference.Tokenize, pb.TokenizeRequest(text=text))
    assert list(reply.ids) == ids
    caller.call(caller.inference.Detokenize, pb.DetokenizeRequest(ids=ids))


def watching(caller: Caller, rng: random.Random) -> None:
    """Call the monitoring endpoints."""
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/"):
        status, data = caller.request("GET", path)
        assert status == 200, f"{path}: {status} {data[:100]!r}"
    caller.call(caller.control.GetLoad, pb.GetLoadRequest())
    caller.call(caller.control.GetModelInfo, pb.GetModelInfoRequest())
    caller.call(caller.control.GetServerInfo, pb.GetServerInfoRequest())
    health = health_pb2_grpc.HealthStub(caller.channel)
    reply = caller.call(health.Check, health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING, reply


def conversation(text: str, *items: pb.MediaItem) -> pb.Conversation:
    parts = [*(pb.ContentPart(media=item) for item in items), pb.ContentPart(text=text)]
    return pb.Conversation(messages=[pb.Message(role="user", content=parts)])


def generate(caller: Caller, message: pb.GenerateRequest) -> None:
    """Generate over gRPC, unary or streaming."""
    if caller.rng.random() < 0.5:
        answers = caller.call(caller.inference.GenerateOnce, message).answers
        texts = {each.index: each.text for each in answers}
    else:
        texts = {}
        for delta in caller.stream(message):
            texts[delta.index] = texts.get(delta.index, "") + delta.text
    caller.answers.check(_key(message), texts)


def _key(message: Message) -> str:
    return str(hash(message.SerializeToString(deterministic=True)))


def grpc_text(caller: Caller, rng: random.Random) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=rng.choice([4, 30]), ignore_eos=True)
    if rng.random() < 0.3:
        sampling.logprobs, sampling.n = 4, 2
    if rng.random() < 0.2:
        sampling.prompt_logprobs = 2
    text = rng.choice((*QUESTIONS, STORY * 20))
    generate(caller, pb.GenerateRequest(conversation=conversation(text), sampling=sampling))


def grpc_media(caller: Caller, rng: random.Random) -> None:
    kind = rng.randrange(4)
    image, video = pb.MEDIA_KIND_IMAGE, pb.MEDIA_KIND_VIDEO
    if kind == 0:
        item = pb.MediaItem(kind=image, data=rng.choice(caller.media.images).data)
    elif kind == 1:
        side = 28 * rng.randint(2, 8)
        pixels = pb.Pixels(data=bytes([side]) * (side * side * 3), shape=[side, side, 3])
        item = pb.MediaItem(kind=image, pixels=pixels)
    elif kind == 2:
        item = pb.MediaItem(kind=video, data=rng.choice(caller.media.videos).data)
    else:
        frames = [f.data for f in caller.media.images if f.name.startswith("56x56")]
        item = pb.MediaItem(kind=video, frames=pb.Frames(data=frames))
    sampling = pb.SamplingParams(temperature=0, max_tokens=10)
    asked = conversation("What is it?", item)
    generate(caller, pb.GenerateRequest(conversation=asked, sampling=sampling))


def grpc_structured(caller: Caller, rng: random.Random) -> None:
    words = [f"word {rng.randrange(10)}", "other", f"new {rng.getrandbits(20)}"]
    structured = pb.StructuredOutput(choice=pb.Choice(texts=words))
    sampling = pb.SamplingParams(temperature=0, max_tokens=40, structured=structured)
    message = pb.GenerateRequest(conversation=conversation("Choose."), sampling=sampling)
    reply = caller.call(caller.inference.GenerateOnce, message)
    assert reply.answers[0].text in words, reply
