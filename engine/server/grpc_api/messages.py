"""Convert between protobuf messages and the engine's prompts, sampling parameters and deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ....proto import octavo_pb2 as pb
from ....scheduler.logprobs import TokenLogprobs
from ....scheduler.params import MAX_TIMEOUT, OptionFields, RequestOptions, SamplingParams
from ....scheduler.structured import MAX_CHOICES, StructuredOutput
from ...config.media_limits import MediaLimits
from ...errors import InputError
from ...input.conversation import Conversation, check_parts, read_conversation
from ...input.parsed_prompt import ParsedPrompt
from ...media.item import MediaInfo
from ...outputs import OutputDelta, Usage
from ...utils.readers import AT_ONCE, MAX_AT_ONCE
from ..errors import RequestRejected
from .media import read_source
from .tools import check_calls, read_message_calls, read_tools, write_calls

KINDS = {pb.MEDIA_KIND_IMAGE: "image", pb.MEDIA_KIND_VIDEO: "video"}
PIECE_TOKENS = 128  # maximum tokens with logprobs per message of a stream
FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "error": pb.FINISH_REASON_UNSPECIFIED,  # reported by the call's status
}
# Key of the field `GenerateReply.answers` on the wire: its number and the type "length-delimited".
ANSWERS = bytes([pb.GenerateReply.ANSWERS_FIELD_NUMBER << 3 | 2])


def read_prompt(request: pb.GenerateRequest, limits: MediaLimits) -> ParsedPrompt:
    """Return the prompt for `AsyncLLM.generate`. Raises `InputError` or `RequestRejected`."""
    _check_counts(request, limits)
    media: dict[str, list[Any]] = {"image": [], "video": []}
    for index, item in enumerate(request.media):
        part = _read_media(item, f"media[{index}]")
        media[part.pop("type")].append(part)
    given = {f"{kind}s": items for kind, items in media.items() if items} | read_tools(request)
    for index, tool in enumerate(request.tools):
        _reject_unknown_of(tool, f"tools[{index}]")
        _reject_unknown_of(tool.function, f"tools[{index}].function")
    form = request.WhichOneof("prompt")
    if form == "conversation":
        return ParsedPrompt.of({"messages": _read_messages(request.conversation), **given})
    if form == "text":
        return ParsedPrompt.of({"prompt": request.text, **given})
    if form == "token_ids":
        _reject_unknown_of(request.token_ids, form)
        return ParsedPrompt.of({"prompt_token_ids": request.token_ids.ids, **given})
    raise InputError("prompt", "is missing; set conversation, text or token_ids")


def is_large(request: pb.GenerateRequest | pb.TokenizeRequest) -> bool:
    """Return whether to read a request in a thread. `check_wire` bounds its size before that."""
    messages, tools = request.conversation.messages, getattr(request, "tools", ())
    count = len(messages) + len(tools)
    count += sum(len(each.content) + len(each.tool_calls) for each in messages[:MAX_AT_ONCE])
    if count > MAX_AT_ONCE:
        return True
    size = sum(len(tool.function.parameters) for tool in tools)
    for message in messages:
        size += sum(len(part.text) for part in message.content)
        size += sum(len(call.function.arguments) for call in message.tool_calls)
    return size > AT_ONCE


def _check_counts(request: pb.GenerateRequest, limits: MediaLimits) -> None:
    """Reject requests with too many small items before iterating over them.

    Raises `InputError`. Iterating would block the event loop.
    """
    messages = request.conversation.messages
    check_parts(len(messages), (len(each.content) for each in messages))
    check_calls(messages)
    items = [*request.media[: limits.max_media_items + 1]]
    items += [part.media for each in messages for part in each.content if part.HasField("media")]
    if len(items) > limits.max_media_items:
        limits.refuse("max_media_items", "prompt", f"{len(items)} images and videos")
    for item in items:
        count = len(item.frames.data) + len(item.frames.frames)
        limits.check_frames(count, "frames")


def _read_messages(conversation: pb.Conversation) -> list[dict[str, Any]]:
    _reject_unknown_of(conversation, "conversation")
    for m, message in enumerate(conversation.messages):
        _reject_unknown_of(message, f"messages[{m}]")
        for c, call in enumerate(message.tool_calls):
            _reject_unknown_of(call, f"messages[{m}].tool_calls[{c}]")
            _reject_unknown_of(call.function, f"messages[{m}].tool_calls[{c}].function")
    return [
        {
            "role": message.role,
            "content": [
                _read_part(part, f"messages[{m}].content[{p}]")
                for p, part in enumerate(message.content)
            ],
            **read_message_calls(message),
        }
        for m, message in enumerate(conversation.messages)
    ]


def _read_part(part: pb.ContentPart, field: str) -> dict[str, Any]:
    _reject_unknown_of(part, field)
    form = part.WhichOneof("part")
    if form == "text":
        return {"type": "text", "text": part.text}
    if form == "media":
        return _read_media(part.media, field)
    raise InputError(field, "is empty; set text or media")


def _read_media(item: pb.MediaItem, field: str) -> dict[str, Any]:
    """Return a media item as a content part. A placeholder has no source."""
    _reject_unknown_of(item, field)
    kind = KINDS.get(item.kind)
    if kind is None:
        raise InputError(f"{field}.kind", f"{item.kind}: must be image or video")
    part: dict[str, Any] = {"type": kind}
    if item.WhichOneof("source") is not None:
        _reject_unknown_in_source(item, field)
        part[kind] = read_source(item, f"{field}.{kind}")
    options = item.options
    _reject_unknown_of(options, f"{field}.options")
    return part | {d.name: getattr(options, d.name) for d, _ in options.ListFields()}


def read_sampling(message: pb.SamplingParams) -> SamplingParams:
    """Read sampling parameters. Absent fields get the checkpoint's default. Raises `InputError`."""
    given = {d.name: getattr(message, d.name) for d, _ in message.ListFields()}
    for name in ("stop", "stop_token_ids", "bad_words"):
        if name in given:
            given[name] = tuple(given[name])
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    if "structured" in given:
        given["structured"] = _read_structured(message.structured)
    return SamplingParams(**given)


def _read_structured(message: pb.StructuredOutput) -> StructuredOutput:
    """Read a structured output constraint. Raises `InputError`."""
    if message.WhichOneof("form") == "choice":
        return StructuredOutput(choice=tuple(message.choice.texts[: MAX_CHOICES + 1]))
    return StructuredOutput(**{d.name: getattr(message, d.name) for d, _ in message.ListFields()})


def read_options(
    request: pb.GenerateRequest, time_remaining: float | None, priority: int | None = None
) -> OptionFields:
    """Read a request's options.

    `time_remaining`: seconds until the gRPC deadline, if any. `priority`: from the call's metadata,
    used if the request sets none. Raises `InputError`.
    """
    options = OptionFields(cache_salt=request.cache_salt)
    if request.HasField("priority"):
        options["priority"] = request.priority
    elif priority is not None:
        options["priority"] = priority
    timeout = request.timeout_s if request.HasField("timeout_s") else None
    if time_remaining is not None and (timeout is None or time_remaining < timeout):
        timeout = min(max(0.0, time_remaining), MAX_TIMEOUT)
    options["timeout_s"] = timeout
    RequestOptions.of(**options)
    return options


def refuse_unknown(request: pb.GenerateRequest) -> None:
    """Raise `RequestRejected` for unknown fields, since ignoring one could change the output.

    `read_prompt` checks messages, media and tools, after it has checked their counts.
    """
    sampling = request.sampling
    messages = {"": request, "sampling": sampling, "sampling.structured": sampling.structured}
    for path, message in messages.items():
        _reject_unknown_of(message, path)


def _reject_unknown_in_source(item: pb.MediaItem, field: str) -> None:
    name = item.WhichOneof("source")
    if name in ("frames", "pixels", "embeddings"):
        _reject_unknown_of(getattr(item, name), f"{field}.{name}")
    if name == "frames":
        for index, frame in enumerate(item.frames.frames):
            _reject_unknown_of(frame, f"{field}.frames[{index}]")
            _reject_unknown_of(frame.pixels, f"{field}.frames[{index}].pixels")


def _reject_unknown_of(message: Message, path: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        text = f"unknown field number {unknown[0].field_number}; upgrade the server or remove it"
        raise RequestRejected("UNIMPLEMENTED", f"{path or message.DESCRIPTOR.name}: {text}", path)


def read_token_prompt(request: pb.TokenizeRequest) -> str | Conversation:
    """Return a text or a conversation. Raises `InputError`."""
    _reject_unknown_of(request, "")
    form = request.WhichOneof("prompt")
    if form == "text":
        return request.text
    if form is None:
        raise InputError("prompt", "is missing; set conversation or text")
    given = request.conversation.messages
    check_parts(len(given), (len(each.content) for each in given))
    check_calls(given)
    return read_conversation(_read_messages(request.conversation))


def split_delta(delta: OutputDelta) -> Iterator[OutputDelta]:
    """Split a delta with many log probabilities into deltas that each take about 1 ms to encode.

    Prompt logprobs come first, then output logprobs with their token ids. The first delta has the
    media, the last one everything else.
    """
    of_prompt, of_tokens = len(delta.prompt_logprobs), len(delta.logprobs)
    if of_prompt + of_tokens <= PIECE_TOKENS:
        yield delta
        return
    piece = OutputDelta(
        delta.request_id, delta.index, media=delta.media, media_times=delta.media_times
    )
    for start in range(0, of_prompt, PIECE_TOKENS):
        yield replace(piece, prompt_logprobs=delta.prompt_logprobs[start : start + PIECE_TOKENS])
        piece = OutputDelta(delta.request_id, delta.index)
    last = max(0, of_tokens - PIECE_TOKENS)
    for start in range(0, last, PIECE_TOKENS):
        part = slice(start, min(start + PIECE_TOKENS, last))
        yield replace(piece, logprobs=delta.logprobs[part], token_ids=delta.token_ids[part])
        piece = OutputDelta(delta.request_id, delta.index)
    yield replace(
        delta,
        media=piece.media,
        media_times=piece.media_times,
        prompt_logprobs=(),
        logprobs=delta.logprobs[last:],
        token_ids=delta.token_ids[last:],
    )


def write_delta(delta: OutputDelta) -> pb.GenerateDelta:
    times = delta.media_times
    return pb.GenerateDelta(
        request_id=delta.request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=FINISH_REASONS[delta.finish_reason],
        usage=_write_usage(delta.usage),
        media=[_write_media(info) for info in delta.media],
        index=delta.index,
        media_times=pb.MediaTimes(**vars(times)) if times else None,
        logprobs=[_write_logprobs(entry) for entry in delta.logprobs],
        prompt_logprobs=[_write_logprobs(entry) for entry in delta.prompt_logprobs],
        tool_calls=write_calls(delta.tool_calls),
    )


def _write_logprobs(entry: TokenLogprobs | None) -> pb.TokenLogprobs:
    """Convert an entry; a token without logprobs gives an empty message."""
    return pb.TokenLogprobs() if entry is None else pb.TokenLogprobs(**entry._asdict())


def reply_pieces(answers: Sequence[OutputDelta]) -> Iterator[bytes]:
    """Serialize the `GenerateReply` of complete outputs in pieces, each made in a short time.

    The bytes of several messages, one after the other, parse as the merged message.
    """
    yield _reply_head(answers).SerializeToString()
    for answer in answers:
        pieces = []
        for piece in split_delta(replace(answer, media=(), media_times=None, usage=None)):
            pieces.append(write_delta(piece).SerializeToString())
            yield b""
        yield ANSWERS + _varint(sum(map(len, pieces)))
        yield from pieces


def _varint(number: int) -> bytes:
    """Encode a length as in protobuf: 7 bits per byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _reply_head(answers: Sequence[OutputDelta]) -> pb.GenerateReply:
    """Return a reply without outputs."""
    usage, times = (
        next((found for a in answers if (found := getattr(a, name)) is not None), None)
        for name in ("usage", "media_times")
    )
    return pb.GenerateReply(
        request_id=answers[0].request_id,
        usage=_write_usage(usage),
        media=[_write_media(info) for answer in answers for info in answer.media],
        media_times=pb.MediaTimes(**vars(times)) if times else None,
    )


def _write_usage(usage: Usage | None) -> pb.Usage | None:
    return None if usage is None else pb.Usage(**vars(usage))


def _write_media(info: MediaInfo) -> pb.ResolvedMedia:
    kind = pb.MEDIA_KIND_IMAGE if info.kind == "image" else pb.MEDIA_KIND_VIDEO
    return pb.ResolvedMedia(
        kind=kind,
        height=info.height,
        width=info.width,
        num_frames=info.num_frames,
        num_tokens=info.num_tokens,
        grid_thw=info.grid_thw,
        frame_indices=info.frame_indices,
        sample_fps=info.sample_fps,
        raw_fps=info.raw_fps,
        frame_times=info.frame_times,
    )
