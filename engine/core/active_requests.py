"""The requests that are here, and what becomes of them as steps' updates come in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from ...scheduler.logprobs import TokenLogprobs
from ...scheduler.request import Request, RequestStatus, UnitKey
from ...scheduler.scheduler import Scheduler
from ...scheduler.step import RequestUpdate
from ...scheduler.trace import TraceWriter
from ..input.processor import InputTimes
from ..media.encode_units import UnitStream
from ..media.item import MediaInfo, UnitContent
from ..observability.stats import EngineStats
from ..outputs import OutputDelta, Usage
from ..structured_output.matchers import Matchers
from .detokenizer import TextStream


@dataclass(eq=False)
class ActiveRequest:
    """A request and its answers: to the scheduler each answer is a request of its own."""

    request_id: str
    requests: tuple[Request, ...]  # one an answer; all after the first share its prompt
    media: tuple[MediaInfo, ...]  # echoed with the first delta, then empty
    tokenizer: Tokenizer
    media_times: InputTimes | None  # likewise; then None
    stream: UnitStream | None = None  # of the units that are still being made
    pixels: dict[UnitKey, UnitContent] = field(default_factory=dict)
    streams: tuple[TextStream, ...] = ()
    has_told_of_prompt: bool = False  # its log probabilities, where they are asked for
    unfinished: set[int] = field(default_factory=set)  # indexes of answers

    def __post_init__(self) -> None:
        params = self.requests[0].params
        settings = (params.include_stop_str, params.skip_special_tokens, params.min_tokens)
        self.streams = tuple(
            TextStream(self.tokenizer, params.stop, *settings) for _ in self.requests
        )
        self.unfinished = set(range(len(self.requests)))

    @property
    def unfinished_names(self) -> list[str]:
        """What the scheduler calls the answers that are not done."""
        return [self.requests[index].request_id for index in sorted(self.unfinished)]

    @property
    def num_prompt_tokens(self) -> int:
        return self.requests[0].num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, found in the prefix cache."""
        return self.requests[0].num_cached_tokens

    def supply(self, units: Sequence[UnitContent]) -> None:
        """The next units of the prompt."""
        hashes = [unit.media_hash for unit in units]
        for request in self.requests:
            request.supply(hashes)
        first = self.requests[0]
        keys = [unit.key for unit in first.units[: first.num_ready_units][-len(units) :]]
        self.pixels |= dict(zip(keys, units, strict=True)) if units else {}

    def take_units(self) -> str:
        """Takes what its stream has made since; what is wrong with the media, if anything is."""
        stream = self.stream
        if stream is None:
            return ""
        is_done = stream.is_done  # before they are taken: then nothing comes after
        self.supply(stream.take())
        if is_done:
            self.stream = None
        return f"INVALID_ARGUMENT: {stream.error}" if is_done and stream.error else ""

    def close(self) -> None:
        """It is over: what is not made yet nobody needs."""
        if self.stream is not None:
            self.stream.cancel()

    def delta(self, index: int, update: RequestUpdate) -> OutputDelta:
        """What an update adds to answer `index`, as text. A stop string found in it ends the
        answer, which its finish_reason then says."""
        stream, status = self.streams[index], update.status
        text = stream.push(update.new_token_ids)
        if status.is_finished:
            text += stream.flush()
        if stream.stopped and status in (RequestStatus.RUNNING, RequestStatus.FINISHED_LENGTH):
            status = RequestStatus.FINISHED_STOPPED
        return self._make(index, status, text, update.new_token_ids, update.error, update.logprobs)

    def failure(self, index: int, error: str) -> OutputDelta:
        """The last delta, by a fault of ours that made no text."""
        return self._make(index, RequestStatus.FINISHED_ERROR, "", (), error)

    def _make(
        self,
        index: int,
        status: RequestStatus,
        text: str,
        token_ids: tuple[int, ...],
        error: str,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> OutputDelta:
        if status.is_finished:
            self.unfinished.discard(index)
        media, self.media = self.media, ()
        times, self.media_times = self.media_times, None
        return OutputDelta(
            request_id=self.request_id,
            index=index,
            text=text,
            token_ids=token_ids,
            finish_reason=status.value if status.is_finished else None,
            usage=None if self.unfinished else self._usage(),
            media=media,
            media_times=times,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs() if index == 0 and token_ids else (),
            error=error,
        )

    def _prompt_logprobs(self) -> Sequence[TokenLogprobs | None]:
        """Where they are asked for, once: the first answer's request has computed the prompt."""
        if self.requests[0].params.prompt_logprobs is None or self.has_told_of_prompt:
            return ()
        self.has_told_of_prompt = True
        return self.requests[0].prompt_logprobs

    def _usage(self) -> Usage:
        num_output_tokens = sum(request.num_output_tokens for request in self.requests)
        return Usage(self.num_prompt_tokens, num_output_tokens, self.num_cached_tokens)


log = logging.getLogger("octavo.engine")


class ActiveRequests:
    """By their ids, and their answers by the scheduler's names."""

    def __init__(
        self,
        scheduler: Scheduler,
        stats: EngineStats,
        matchers: Matchers,
        trace: TraceWriter | None,
    ) -> None:
        self._scheduler, self._stats = scheduler, stats
        self._matchers, self._trace = matchers, trace
        self._live: dict[str, ActiveRequest] = {}
        self._answers: dict[str, tuple[ActiveRequest, int]] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, name: str) -> bool:
        """Whether a request or an answer has the name."""
        return name in self._answers or name in self._live

    @property
    def await_media(self) -> bool:
        """Whether units of a request are still being made."""
        return any(live.stream for live in self._live.values())

    def pixels_of(self, name: str) -> Mapping[UnitKey, UnitContent]:
        """Those of an answer's request that were not encoded yet."""
        return self._answers[name][0].pixels

    def add(self, live: ActiveRequest, names: Sequence[str]) -> None:
        """`names`: of its answers, which the scheduler has by now."""
        self._live[live.request_id] = live
        self._answers |= {name: (live, index) for index, name in enumerate(names)}

    def abort(self, request_id: str) -> list[OutputDelta]:
        """The last delta of each answer that was not done; none where the request is not here."""
        live = self._live.get(request_id)
        if live is None:
            return []
        status = RequestStatus.FINISHED_ABORTED
        return self.deltas(
            self._scheduler.finish(name, status) or RequestUpdate(name, (), status)
            for name in live.unfinished_names
        )

    def give_up(self, error: str) -> list[OutputDelta]:
        """Ends all of them."""
        return self.deltas(
            RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
            for name in tuple(self._answers)
        )

    def take_media(self) -> list[RequestUpdate]:
        """Hands on the units that were made since; the ends of requests whose media are broken."""
        failed = []
        for live in self._live.values():
            if live.stream is not None and (error := live.take_units()):
                failed += [
                    RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
                    for name in live.unfinished_names
                ]
        return failed

    def deltas(self, updates: Iterable[RequestUpdate]) -> list[OutputDelta]:
        """What updates come to as text. Those of a request that has ended before are dropped. An
        error of one answer ends the others, after what this step gave them."""
        deltas: list[OutputDelta] = []
        failed: list[tuple[ActiveRequest, str]] = []
        for update in updates:
            if update.request_id in self._answers:
                live, index = self._answers[update.request_id]
                deltas.append(self._delta(live, index, update))
                if deltas[-1].error:
                    failed.append((live, deltas[-1].error))
        for live, error in failed:
            for name in live.unfinished_names:
                update = RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
                deltas.append(self._delta(*self._answers[name], update))
        return self._stats.take(deltas)

    def _delta(self, live: ActiveRequest, index: int, update: RequestUpdate) -> OutputDelta:
        """One update's text. Its answer may end with it."""
        try:
            delta = live.delta(index, update)
        except Exception:  # a fault of ours: this request's alone all the same
            log.exception("request %r: its tokens made no text", live.request_id)
            delta = live.failure(index, "INTERNAL: the answer's tokens made no text")
        if delta.finish_reason is not None:
            self._end(update.request_id, update, delta.finish_reason)
            if not live.unfinished:
                live.close()
                del self._live[live.request_id]
        return delta

    def _end(self, name: str, update: RequestUpdate, reason: str) -> None:
        """An answer is over, perhaps before the scheduler thinks so. Its name may be used again."""
        del self._answers[name]
        self._matchers.remove(name)
        if not update.status.is_finished or update.error:
            self._scheduler.finish(name, RequestStatus.FINISHED_STOPPED, update.error)
        if self._trace is not None:
            self._trace.end(name, reason)
