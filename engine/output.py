"""From token ids to text: deltas, stop strings, finish reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..scheduler.logprobs import LogprobTable, TokenLogprobs
from .input.processor import InputTimes
from .media.item import MediaInfo
from .tool_calls import ToolCall


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


class TextStream:
    """Makes text of one request's tokens as they come, and finds its stop strings.

    Text that may still turn into a stop string, and bytes that are not yet a whole character, are
    held back until they are decided. No stop string is looked for in the text of the first
    `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """`include_stop`: the stop string that is found is shown."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decode = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop, self._include_stop = tuple(stop), include_stop
        self._begun = [0] * len(self._stop)  # characters of each that the text so far ends with
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._decoded = 0  # characters decoded so far, held back or not
        self._held = ""
        self.stopped = False  # a stop string was found; nothing follows it

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` add, up to a stop string."""
        if len(token_ids) == 1 and not self._stop:  # one of each step's many: nothing is held
            self._token_ids.append(token_ids[0])
            piece = self._decode.step(self._tokenizer, token_ids[0]) or ""
            self._decoded += len(piece)
            return piece
        early, text = "", ""
        for token in token_ids:
            self._token_ids.append(token)
            piece = self._decode.step(self._tokenizer, token) or ""
            if len(self._token_ids) <= self._min_tokens:
                early += piece
            else:
                text += piece
        self._decoded += len(early) + len(text)
        return early + self._release(text)

    def flush(self) -> str:
        """What was held back, when the output ends for another reason than a stop string."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._token_ids, self._skip_special_tokens)
        text = self._release(whole[self._decoded :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        """Adds `text` to what is held and gives out what cannot be part of a stop string."""
        if self.stopped:
            return ""
        more, text = len(text), self._held + text
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            at, stop = min(found)
            return text[: at + len(stop) * self._include_stop]
        # None is begun by more than before: else each token would go through all of each.
        pairs = zip(self._stop, self._begun, strict=True)
        self._begun = [_overlap(text, stop, begun + more) for stop, begun in pairs]
        keep = max(self._begun, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str, most: int) -> int:
    """Length of the longest end of `text` that begins `stop`; it is known to be at most `most`."""
    for size in range(min(len(text), len(stop) - 1, most), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
