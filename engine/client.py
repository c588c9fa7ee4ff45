"""A client for `octavo serve`: messages as the model card writes them, deltas as they come.

Imports neither torch nor the engine: it is light enough for any program. Local files are read here
and sent as bytes, since a server reads none of its own.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from ..proto import octavo_pb2 as pb
from ..proto import octavo_pb2_grpc
from ..scheduler.params import shown

MAX_MESSAGE_BYTES = 256 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
]
OPTIONS_OF_A_REQUEST = ("priority", "timeout_s", "cache_salt")
KINDS = {"image": pb.MEDIA_KIND_IMAGE, "video": pb.MEDIA_KIND_VIDEO}
FINISH_REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


class ClientError(RuntimeError):
    """A call that the server refused or could not finish. `code` is gRPC's, such as
    "INVALID_ARGUMENT" or "UNAVAILABLE"."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


@dataclass(frozen=True)
class ClientDelta:
    """What a step added to an answer."""

    request_id: str
    index: int  # which of the n answers
    text: str
    token_ids: tuple[int, ...]  # new ones only
    finish_reason: str | None  # on the answer's last delta
    usage: pb.Usage | None  # over all answers, on the last delta of all
    media: tuple[pb.ResolvedMedia, ...]  # on the first delta: sizes, frames and tokens used


Deltas = Generator[ClientDelta, None, None]


class Client:
    """A connection to a server. Thread-safe; a context manager."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        """`address`: HOST:PORT. Connects when first used."""
        self.address = address
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = octavo_pb2_grpc.InferenceStub(self._channel)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **settings: Any,
    ) -> Deltas:
        """Answers one conversation. `settings`: the fields of `octavo.SamplingParams`, and
        `priority`, `timeout_s` and `cache_salt` as in `octavo.RequestOptions`.

        `timeout`: seconds after which this client gives up by itself. Leaving the iterator early
        aborts the request. Raises `ClientError`.
        """
        conversation = pb.Conversation(messages=[_message(message) for message in messages])
        request = pb.GenerateRequest(request_id=request_id, conversation=conversation)
        return self._generate(request, images, videos, timeout, settings)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **settings: Any,
    ) -> Deltas:
        """Continues a raw text or token ids. Otherwise as `chat`."""
        request = pb.GenerateRequest(request_id=request_id)
        try:
            if isinstance(prompt, str):
                request.text = prompt
            else:
                request.token_ids.ids.extend(prompt)
        except (TypeError, ValueError) as error:
            raise _invalid(f"prompt: must be a text or token ids: {error}") from None
        return self._generate(request, images, videos, timeout, settings)

    def abort(self, request_id: str) -> bool:
        """Ends a request; False when the server does not know it."""
        try:
            return self._stub.Abort(pb.AbortRequest(request_id=request_id)).found
        except grpc.RpcError as error:
            raise _client_error(error) from None

    def wait_ready(self, timeout: float) -> None:
        """Waits until the server can be reached. Raises `ClientError` after `timeout` seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError:
            raise ClientError("UNAVAILABLE", f"no server at {self.address}") from None

    def _generate(
        self,
        request: pb.GenerateRequest,
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
        timeout: float | None,
        settings: Mapping[str, Any],
    ) -> Deltas:
        for kind, sources in (("image", images), ("video", videos)):
            for source in sources or ():
                beside = source if isinstance(source, Mapping) else {kind: source}
                request.media.append(_media({**beside, "type": kind}))
        _set_all(request, settings)
        return self._stream(request, timeout)

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> Deltas:
        if timeout is not None and not isinstance(timeout, int | float):
            raise _invalid(f"timeout={timeout!r}: must be seconds")
        try:
            call = self._stub.Generate(request, timeout=timeout)
        except ValueError:
            raise ClientError("UNAVAILABLE", "this client was closed") from None
        try:
            for delta in call:
                yield ClientDelta(
                    request_id=delta.request_id,
                    index=delta.index,
                    text=delta.text,
                    token_ids=tuple(delta.token_ids),
                    finish_reason=FINISH_REASONS[delta.finish_reason],
                    usage=delta.usage if delta.HasField("usage") else None,
                    media=tuple(delta.media),
                )
        except grpc.RpcError as error:
            raise _client_error(error) from None
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _client_error(error: grpc.RpcError) -> ClientError:
    return ClientError(error.code().name, error.details() or "")


def _invalid(text: str) -> ClientError:
    """What the server would refuse, refused before it travels."""
    return ClientError("INVALID_ARGUMENT", text)


def _set_all(request: pb.GenerateRequest, settings: Mapping[str, Any]) -> None:
    """Writes sampling values and options where they belong."""
    known = [*pb.SamplingParams.DESCRIPTOR.fields_by_name, *OPTIONS_OF_A_REQUEST]
    for name, value in settings.items():
        if name not in known:
            raise _invalid(f"{name}: unknown; settings are {', '.join(known)}")
        if value is None:
            continue
        target = request if name in OPTIONS_OF_A_REQUEST else request.sampling
        try:
            if name in ("stop", "stop_token_ids"):
                getattr(target, name).extend([value] if isinstance(value, str) else value)
            else:
                setattr(target, name, value)
        except (TypeError, ValueError) as error:
            raise _invalid(f"{name}={shown(value)}: {error}") from None


def _message(message: Mapping[str, Any]) -> pb.Message:
    if not isinstance(message, Mapping):
        raise _invalid("messages: must be a list of dicts with role and content")
    for name in message:
        if name not in ("role", "content"):
            raise _invalid(f"messages: {name!r} is unknown; a message has role and content")
    content = message.get("content", ())
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    try:
        return pb.Message(role=message.get("role", ""), content=[_part(part) for part in parts])
    except (TypeError, ValueError) as error:  # ValueError: half a surrogate pair in a text
        raise _invalid(f"messages: {error}") from None


def _part(part: Mapping[str, Any]) -> pb.ContentPart:
    if not isinstance(part, Mapping):
        raise _invalid(f"messages: a part must be a dict, not {type(part).__name__}")
    if part.get("type") == "text":
        return pb.ContentPart(text=part.get("text", ""))
    if part.get("type") in KINDS:
        return pb.ContentPart(media=_media(part))
    raise _invalid(f"type={part.get('type')!r}: must be text, image or video")


def _media(part: Mapping[str, Any]) -> pb.MediaItem:
    kind = part["type"]
    item = pb.MediaItem(kind=KINDS[kind])
    known = pb.MediaOptions.DESCRIPTOR.fields_by_name
    for name, value in part.items():
        if name in ("type", kind) or value is None:
            continue
        if name not in known:
            raise _invalid(f"{name}: no option; {kind}s have {', '.join(known)}")
        try:
            setattr(item.options, name, value)
        except (TypeError, ValueError):
            raise _invalid(f"{name}={value!r}: must be a number") from None
    source = part.get(kind)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray):
        item.frames.data.extend(_bytes(frame) for frame in source)
    elif isinstance(source, str) and source[:8].lower().startswith(
        ("data:", "http://", "https://")
    ):
        item.url = source
    elif source is not None:
        item.data = _bytes(source)
    return item


def _bytes(source: Any) -> bytes:
    """The bytes of a file, of bytes, or of a PIL image as PNG."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        path = str(source)
        path = unquote(path[7:]) if path.startswith("file://") else path
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise _invalid(f"{path!r}: {error.strerror}") from None
    if hasattr(source, "getexif"):  # a PIL image, known without importing PIL
        return _png(source)
    raise _invalid(f"{type(source).__name__} is no path, data URI, bytes or PIL image")


def _png(image: Any) -> bytes:
    """A PIL image without loss: its EXIF goes along, since it says which side is up."""
    buffer = io.BytesIO()
    try:
        if image.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
            exif, image = image.getexif(), image.convert("RGB")
        else:
            exif = image.getexif()
        image.save(buffer, "PNG", exif=exif)
    except (OSError, ValueError) as error:
        raise _invalid(f"image of mode {image.mode}: cannot be sent: {error}") from None
    return buffer.getvalue()
