"""From token ids to text: deltas, stop strings, finish reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..scheduler.logprobs import LogprobTable, TokenLogprobs
from .input.processor import InputTimes
from .media.item import MediaInfo
from .tool_calling.parser import ToolCall


@dataclass(frozen=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    output_tokens: int  # of all answers
    cached_tokens: int = 0  # of the prompt, found in the prefix cache


@dataclass(frozen=True)
class RequestTimes:
    """Seconds of a request's stages, as the engine saw them; None where it did not come so far."""

    preprocess_s: float  # its input was made ready, waiting for a thread included
    queue_s: float  # ready, until a step took it up
    prefill_s: float | None  # from then to the first token
    encode_s: float | None  # of that in encode stages with its images; None: nothing was encoded
    decode_s: float | None  # from then to the end
    ttft_s: float | None  # from its arrival to the first token
    total_s: float


@dataclass(frozen=True)
class OutputDelta:
    """What one step added to one request's output."""

    request_id: str
    index: int = 0  # which of the n answers
    text: str = ""
    token_ids: tuple[int, ...] = ()  # new ones only
    finish_reason: str | None = None  # "stop", "length", "abort" or "error": the answer's last
    usage: Usage | None = None  # over all answers, on the request's last delta
    media: tuple[MediaInfo, ...] = ()  # on the first delta
    media_times: InputTimes | None = None  # on the first delta; zeros where there are no media
    logprobs: Sequence[TokenLogprobs] = ()  # of token_ids, where they were asked for
    # On the first answer's delta with its first token, where they were asked for: one a token of
    # the prompt; None for the first, and for those of images and videos.
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    error: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # of the request's tools; they are no part of the text
    times: RequestTimes | None = None  # on the request's last delta

    def named(self, request_id: str) -> OutputDelta:
        """The same of a request by another name: `replace`, without its price, for each delta of
        every stream."""
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
    # Of token_ids, if asked for.
    logprobs: list[TokenLogprobs] | LogprobTable = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)  # no part of the text


@dataclass
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt_token_ids: list[int] = field(default_factory=list)  # after placeholder expansion
    outputs: list[Output] = field(default_factory=lambda: [Output()])
    media: tuple[MediaInfo, ...] = ()
    media_times: InputTimes | None = None  # what they took; zeros where there are none
    usage: Usage | None = None
    # One a token of the prompt, if asked for; None for the first, and for those of media.
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    error: str = ""

    @property
    def is_finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def fail(self, error: str) -> None:
        """Ends every answer that has not ended."""
        self.error = error
        for output in self.outputs:
            output.finish_reason = output.finish_reason or "error"

    def add(self, delta: OutputDelta) -> None:
        """Appends what a step added."""
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
        if delta.error:
            self.fail(delta.error)
