"""Client for `octavo serve`: takes messages in the model card's format and streams deltas.

Imports neither torch nor the engine, so it is light enough for any program. `media.py` lists the
supported sources of images and videos.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from ...proto import octavo_pb2 as pb
from ...scheduler.logprobs import TokenLogprobs
from ...scheduler.params import SamplingParams
from ..tool_calling.parser import ToolCall
from ..utils.lifetime import track_call
from .channel import Tls, argument_of, error_of
from .errors import ClientError
from .requests import chat_request, conversation_of, fill, raw_request, read_prompt, with_params
from .tools import add_tools, read_calls
from .unary import UnaryClient

__all__ = ["Client", "ClientDelta", "ClientError", "ClientReply", "Deltas", "Tls"]

FINISH_REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True)
class ClientDelta:
    """New output of an answer since its last delta."""

    request_id: str
    index: int  # index of the answer, 0 to n - 1
    text: str
    token_ids: tuple[int, ...]  # new tokens
    finish_reason: str | None  # on the last delta of each answer
    usage: pb.Usage | None  # over all answers, on the last delta of the request
    media: tuple[pb.ResolvedMedia, ...]  # on the first delta: sizes, frames and tokens used
    media_times: pb.MediaTimes | None  # on the first delta
    logprobs: tuple[TokenLogprobs, ...]  # one per token of token_ids, if requested
    # One per prompt token, if requested, on the first answer's delta with its first token. None for
    # the first prompt token and for media tokens.
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    tool_calls: tuple[ToolCall, ...] = ()  # calls of the request's tools; not part of the text


Deltas = Generator[ClientDelta, None, None]


@dataclass(frozen=True)
class ClientReply:
    """The complete answers to a prompt."""

    request_id: str
    answers: tuple[ClientDelta, ...]  # complete answers by index, without the values below
    usage: pb.Usage  # over all answers
    media: tuple[pb.ResolvedMedia, ...]
    media_times: pb.MediaTimes


class Client(UnaryClient):
    """A connection to a server. Thread-safe, and usable as a context manager."""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **settings: Any,
    ) -> Deltas:
        """Stream the answers to a conversation.

        `tools`, `tool_choice`, `parallel_tool_calls`: as in `octavo.LLM.chat`.
        `settings`: fields of `octavo.SamplingParams`, unless `params` is given, and `priority`,
        `timeout_s` and `cache_salt` of `octavo.RequestOptions`.
        `timeout`: the call's deadline, in seconds.

        Closing the iterator early aborts the request. Raises `ClientError`.
        """
        request = chat_request(messages, request_id)
        add_tools(request, tools, tool_choice, parallel_tool_calls)
        return self._generate(request, images, videos, timeout, with_params(params, settings))

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **settings: Any,
    ) -> Deltas:
        """Stream continuations of a raw text or token ids. Otherwise like `chat`."""
        request = raw_request(prompt, request_id)
        return self._generate(request, images, videos, timeout, with_params(params, settings))

    def generate_once(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **settings: Any,
    ) -> ClientReply:
        """Return complete answers to a text, token ids or a conversation. Otherwise like `chat`."""
        request = read_prompt(prompt, request_id)
        add_tools(request, tools, tool_choice, parallel_tool_calls)
        fill(request, images, videos, with_params(params, settings))
        reply = self._call(self._stub.GenerateOnce, request, timeout)
        answers = tuple(_client_delta(answer) for answer in reply.answers)
        media = tuple(reply.media)
        return ClientReply(reply.request_id, answers, reply.usage, media, reply.media_times)

    def tokenize(
        self, prompt: str | Sequence[Mapping[str, Any]], plain: bool = False
    ) -> tuple[int, ...]:
        """Return the token ids of a text or a conversation.

        Each image or video gives one placeholder token. `plain`: do not parse special tokens in the
        text. Raises `ClientError`.
        """
        request = pb.TokenizeRequest(plain=plain)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.conversation.CopyFrom(conversation_of(prompt))
        return tuple(self._call(self._stub.Tokenize, request).ids)

    def _generate(
        self,
        request: pb.GenerateRequest,
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
        timeout: float | None,
        settings: Mapping[str, Any],
    ) -> Deltas:
        fill(request, images, videos, settings)
        return self._stream(request, timeout)

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> Deltas:
        call = track_call(self._start(self._stub.Generate, request, timeout))
        try:
            for delta in call:
                yield _client_delta(delta)
                self._check_owner()  # the process may have been forked meanwhile
                if delta.HasField(
                    "failure"
                ):  # on the last delta; the call's status has the same error
                    failure = delta.failure
                    field = argument_of(failure.field)
                    raise ClientError(failure.code, failure.text, failure.retryable, field)
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            if not self._disowned:  # else the call belongs to the parent process
                call.cancel()


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
        tool_calls=read_calls(delta.tool_calls),
    )
