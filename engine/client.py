"""A client for `octavo serve`: messages as the model card writes them, deltas as they come.

Imports neither torch nor the engine: it is light enough for any program. What an image or a video
may be says `client_media.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from ..proto import octavo_pb2 as pb
from ..proto import octavo_pb2_grpc
from ..scheduler.logprobs import TokenLogprobs
from ..scheduler.params import shown
from ..scheduler.structured import StructuredOutput
from .client_channel import Tls, error_of, key_metadata, open_channel
from .client_error import ClientError, invalid
from .client_media import KINDS, check_size, media_item

__all__ = ["Client", "ClientDelta", "ClientError", "Deltas", "Tls"]

OPTIONS_OF_A_REQUEST = ("priority", "timeout_s", "cache_salt")
FINISH_REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


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
    media_times: pb.MediaTimes | None  # on the first delta
    logprobs: tuple[TokenLogprobs, ...]  # of token_ids, where they were asked for
    # On the first answer's delta with its first token, where they were asked for: one a token of
    # the prompt; None for the first, and for those of images and videos.
    prompt_logprobs: tuple[TokenLogprobs | None, ...]


Deltas = Generator[ClientDelta, None, None]


class Client:
    """A connection to a server. Thread-safe; a context manager."""

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        tls: Tls | bool = False,
    ) -> None:
        """`address`: HOST:PORT. `api_key`: where the server asks for one. `tls`: True, or an
        `octavo.Tls` with files. Connects when first used."""
        self.address = address
        self._metadata = key_metadata(api_key)
        self._channel = open_channel(address, tls)
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
            raise invalid(f"prompt: must be a text or token ids: {error}") from None
        return self._generate(request, images, videos, timeout, settings)

    def abort(self, request_id: str) -> bool:
        """Ends a request; False when the server does not know it."""
        try:
            request = pb.AbortRequest(request_id=request_id)
            return self._stub.Abort(request, metadata=self._metadata).found
        except grpc.RpcError as error:
            raise error_of(error) from None

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
                request.media.append(media_item({**beside, "type": kind}))
        _set_all(request, settings)
        check_size(request)
        return self._stream(request, timeout)

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> Deltas:
        if timeout is not None and not isinstance(timeout, int | float):
            raise invalid(f"timeout={timeout!r}: must be seconds")
        try:
            call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        except ValueError:
            raise ClientError("UNAVAILABLE", "this client was closed") from None
        try:
            for delta in call:
                yield _client_delta(delta)
                if delta.HasField("failure"):  # the last one; the call's status says the same
                    failure = delta.failure
                    raise ClientError(failure.code, failure.text, failure.retryable)
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _logprobs(entry: pb.TokenLogprobs) -> TokenLogprobs:
    top = array("i", entry.top_token_ids), array("f", entry.top_logprobs)
    return TokenLogprobs(entry.token_id, entry.logprob, *top)


def _client_delta(delta: pb.GenerateDelta) -> ClientDelta:
    return ClientDelta(
        request_id=delta.request_id,
        index=delta.index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        finish_reason=FINISH_REASONS[delta.finish_reason],
        usage=delta.usage if delta.HasField("usage") else None,
        media=tuple(delta.media),
        media_times=delta.media_times if delta.HasField("media_times") else None,
        logprobs=tuple(_logprobs(entry) for entry in delta.logprobs),
        prompt_logprobs=tuple(
            _logprobs(entry) if entry.HasField("logprob") else None
            for entry in delta.prompt_logprobs
        ),
    )


def _set_all(request: pb.GenerateRequest, settings: Mapping[str, Any]) -> None:
    """Writes sampling values and options where they belong."""
    known = [*pb.SamplingParams.DESCRIPTOR.fields_by_name, *OPTIONS_OF_A_REQUEST]
    for name, value in settings.items():
        if name not in known:
            raise invalid(f"{name}: unknown; settings are {', '.join(known)}")
        if value is None:
            continue
        target = request if name in OPTIONS_OF_A_REQUEST else request.sampling
        try:
            if name == "logit_bias":
                target.logit_bias.update(value)  # type: ignore[union-attr]
            elif name == "structured":
                target.structured.CopyFrom(_structured(value))  # type: ignore[union-attr]
            elif name in ("stop", "stop_token_ids", "bad_words"):
                getattr(target, name).extend([value] if isinstance(value, str) else value)
            else:
                setattr(target, name, value)
        except (TypeError, ValueError) as error:
            raise invalid(f"{name}={shown(value)}: {error}") from None


def _structured(form: Any) -> pb.StructuredOutput:
    """Raises TypeError or ValueError."""
    if not isinstance(form, StructuredOutput):
        raise TypeError("must be an octavo.StructuredOutput")
    if form.choice:
        return pb.StructuredOutput(choice=pb.Choice(texts=form.choice))
    return pb.StructuredOutput(**{form.field: getattr(form, form.field)})


def _message(message: Mapping[str, Any]) -> pb.Message:
    if not isinstance(message, Mapping):
        raise invalid("messages: must be a list of dicts with role and content")
    for name in message:
        if name not in ("role", "content"):
            raise invalid(f"messages: {name!r} is unknown; a message has role and content")
    content = message.get("content", ())
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    try:
        return pb.Message(role=message.get("role", ""), content=[_part(part) for part in parts])
    except (TypeError, ValueError) as error:  # ValueError: half a surrogate pair in a text
        raise invalid(f"messages: {error}") from None


def _part(part: Mapping[str, Any]) -> pb.ContentPart:
    if not isinstance(part, Mapping):
        raise invalid(f"messages: a part must be a dict, not {type(part).__name__}")
    if part.get("type") == "text":
        return pb.ContentPart(text=part.get("text", ""))
    if part.get("type") in KINDS:
        return pb.ContentPart(media=media_item(part))
    raise invalid(f"type={part.get('type')!r}: must be text, image or video")
