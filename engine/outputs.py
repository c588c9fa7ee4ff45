"""Request outputs: streamed deltas, and complete answers built from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..scheduler.logprobs import LogprobTable, TokenLogprobs
from .errors import RequestError
from .input.processor import InputTimes
from .media.item import MediaInfo
from .tool_calling.parser import ToolCall


@dataclass(frozen=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    output_tokens: int  # sum over all answers
    cached_tokens: int = 0  # prompt tokens found in the prefix cache


@dataclass(frozen=True)
class RequestTimes:
    """Duration of each stage of a request in seconds; None for stages it did not reach."""

    preprocess_s: float  # input preprocessing, including the wait for a thread
    queue_s: float  # from preprocessed to first scheduled
    prefill_s: float | None  # from first scheduled to the first token
    encode_s: float | None  # vision encoding of its media, part of prefill_s; None: no encoding
    decode_s: float | None  # from the first token to the end
    ttft_s: float | None  # from arrival to the first token
    total_s: float


@dataclass(frozen=True)
class OutputDelta:
    """Output that one step added to one answer of a request."""

    request_id: str
    index: int = 0  # of the answer, 0 to n - 1
    text: str = ""
    token_ids: tuple[int, ...] = ()  # new ones only
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; on the last delta
    usage: Usage | None = None  # over all answers, on the request's last delta
    media: tuple[MediaInfo, ...] = ()  # on the request's first delta
    media_times: InputTimes | None = None  # on the request's first delta; zeros without media
    logprobs: Sequence[TokenLogprobs] = ()  # one per entry of token_ids, if requested
    # One per prompt token, if requested, on the delta with the first answer's first token. None
    # for the first prompt token and for image and video tokens.
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    failure: RequestError | None = None  # on the last delta of each answer
    tool_calls: tuple[ToolCall, ...] = ()  # not part of `text`
    times: RequestTimes | None = None  # on the request's last delta

    @property
    def error(self) -> str:
        """`failure` as text, "CODE: message"; "" without one."""
        return str(self.failure) if self.failure else ""

    def named(self, request_id: str) -> OutputDelta:
        """Return a copy with another request_id.

        Cheaper than `dataclasses.replace`: it is called for every delta of every stream.
        """
        other = object.__new__(OutputDelta)
        other.__dict__.update(self.__dict__, request_id=request_id)
        return other


@dataclass
class Output:
    """One answer to a prompt."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    # One per entry of token_ids, if requested.
    logprobs: list[TokenLogprobs] | LogprobTable = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)  # not part of `text`


@dataclass
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt_token_ids: list[int] = field(default_factory=list)  # after placeholder expansion
    outputs: list[Output] = field(default_factory=lambda: [Output()])
    media: tuple[MediaInfo, ...] = ()
    media_times: InputTimes | None = None  # zeros without media
    usage: Usage | None = None
    # One per prompt token, if requested; None for the first token and for media tokens.
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    error: str = ""

    @property
    def is_finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def fail(self, error: str) -> None:
        """Finish all unfinished answers with an error."""
        self.error = error
        for output in self.outputs:
            output.finish_reason = output.finish_reason or "error"

    def add(self, delta: OutputDelta) -> None:
        """Append a delta to its answer."""
        output = self.outputs[delta.index]
        output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        output.logprobs.extend(delta.logprobs)
        output.tool_calls.extend(delta.tool_calls)
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        output.finish_reason = delta.finish_reason or output.finish_reason
        self.media = delta.media or self.media
        self.media_times = delta.media_times or self.media_times
        self.usage = delta.usage or self.usage
        if delta.failure:
            self.fail(delta.error)
