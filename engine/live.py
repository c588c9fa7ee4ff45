"""What the engine keeps of a request beside the scheduler's part: pixels, and text as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from ..scheduler.request import Request, RequestStatus, UnitKey
from ..scheduler.step import RequestUpdate
from .input.media import MediaInfo
from .output import OutputDelta, TextStream, Usage
from .step_input import UnitPixels


@dataclass(eq=False)
class LiveRequest:
    """A request and its answers: to the scheduler each answer is a request of its own."""

    request_id: str
    requests: tuple[Request, ...]  # one an answer; all after the first share its prompt
    pixels: Mapping[UnitKey, UnitPixels]
    media: tuple[MediaInfo, ...]  # echoed with the first delta, then empty
    tokenizer: Tokenizer
    streams: tuple[TextStream, ...] = ()
    unfinished: set[int] = field(default_factory=set)  # indexes of answers

    def __post_init__(self) -> None:
        stop = self.requests[0].params.stop
        self.streams = tuple(TextStream(self.tokenizer, stop) for _ in self.requests)
        self.unfinished = set(range(len(self.requests)))

    @property
    def unfinished_names(self) -> list[str]:
        """What the scheduler calls the answers that are not done."""
        return [self.requests[index].request_id for index in sorted(self.unfinished)]

    def delta(self, index: int, update: RequestUpdate) -> OutputDelta:
        """What an update adds to answer `index`, as text. A stop string found in it ends the
        answer, which its finish_reason then says."""
        stream, status = self.streams[index], update.status
        text = stream.push(update.new_token_ids)
        if status.is_finished:
            text += stream.flush()
        if stream.stopped and status in (RequestStatus.RUNNING, RequestStatus.FINISHED_LENGTH):
            status = RequestStatus.FINISHED_STOPPED
        return self._make(index, status, text, update.new_token_ids, update.error)

    def failure(self, index: int, error: str) -> OutputDelta:
        """The last delta, by a fault of ours that made no text."""
        return self._make(index, RequestStatus.FINISHED_ERROR, "", (), error)

    def _make(
        self, index: int, status: RequestStatus, text: str, token_ids: tuple[int, ...], error: str
    ) -> OutputDelta:
        if status.is_finished:
            self.unfinished.discard(index)
        media, self.media = self.media, ()
        return OutputDelta(
            request_id=self.request_id,
            index=index,
            text=text,
            token_ids=token_ids,
            finish_reason=status.value if status.is_finished else None,
            usage=None if self.unfinished else self._usage(),
            media=media,
            error=error,
        )

    def _usage(self) -> Usage:
        first = self.requests[0]
        num_output_tokens = sum(request.num_output_tokens for request in self.requests)
        return Usage(first.num_prompt_tokens, num_output_tokens, first.num_cached_tokens)
