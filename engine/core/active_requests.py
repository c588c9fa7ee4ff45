"""Registry of active requests; turns scheduler updates into output deltas."""

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
from ..errors import RequestError
from ..input.processor import InputTimes
from ..media.encode_units import UnitStream
from ..media.item import MediaInfo, UnitContent
from ..observability.stats import EngineStats
from ..outputs import OutputDelta, Usage
from ..structured_output.matchers import Matchers
from .detokenizer import TextStream


@dataclass(eq=False)
class ActiveRequest:
    """Engine-side state of an active request: pending pixels and incremental detokenization.

    The scheduler treats each of the n answers as a request of its own.
    """

    request_id: str
    requests: tuple[Request, ...]  # one per answer; all share the first one's prompt
    media: tuple[MediaInfo, ...]  # sent with the first delta, then empty
    tokenizer: Tokenizer
    media_times: InputTimes | None  # sent with the first delta, then None
    stream: UnitStream | None = None  # media units that are still being decoded
    pixels: dict[UnitKey, UnitContent] = field(default_factory=dict)
    streams: tuple[TextStream, ...] = ()
    has_sent_prompt_logprobs: bool = False
    unfinished: set[int] = field(default_factory=set)  # indices of answers

    def __post_init__(self) -> None:
        params = self.requests[0].params
        settings = (params.include_stop_str, params.skip_special_tokens, params.min_tokens)
        self.streams = tuple(
            TextStream(self.tokenizer, params.stop, *settings) for _ in self.requests
        )
        self.unfinished = set(range(len(self.requests)))

    @property
    def unfinished_names(self) -> list[str]:
        """The scheduler's request ids of unfinished answers."""
        return [self.requests[index].request_id for index in sorted(self.unfinished)]

    @property
    def num_prompt_tokens(self) -> int:
        return self.requests[0].num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Number of prompt tokens found in the prefix cache."""
        return self.requests[0].num_cached_tokens

    def supply(self, units: Sequence[UnitContent]) -> None:
        """Add the next decoded media units of the prompt."""
        hashes = [unit.media_hash for unit in units]
        for request in self.requests:
            request.supply(hashes)
        first = self.requests[0]
        keys = [unit.key for unit in first.units[: first.num_ready_units][-len(units) :]]
        self.pixels |= dict(zip(keys, units, strict=True)) if units else {}

    def take_units(self) -> RequestError | None:
        """Take newly decoded units from the stream. Return its error, if any."""
        stream = self.stream
        if stream is None:
            return None
        is_done = stream.is_done  # Read before `take`, so that no unit is missed.
        self.supply(stream.take())
        if is_done:
            self.stream = None
        return stream.error.reason if is_done and stream.error else None

    def close(self) -> None:
        """Cancel media that is still being decoded."""
        if self.stream is not None:
            self.stream.cancel()

    def delta(self, index: int, update: RequestUpdate) -> OutputDelta:
        """Detokenize an update of answer `index`.

        A stop string in the text finishes the answer with finish_reason "stop".
        """
        stream, status = self.streams[index], update.status
        text = stream.push(update.new_token_ids)
        if status.is_finished:
            text += stream.flush()
        if stream.stopped and status in (RequestStatus.RUNNING, RequestStatus.FINISHED_LENGTH):
            status = RequestStatus.FINISHED_STOPPED
        return self._make(index, status, text, update.new_token_ids, update.error, update.logprobs)

    def failed(self, index: int, error: RequestError) -> OutputDelta:
        """Return the final delta for an internal error in detokenization."""
        return self._make(index, RequestStatus.FINISHED_ERROR, "", (), error)

    def _make(
        self,
        index: int,
        status: RequestStatus,
        text: str,
        token_ids: tuple[int, ...],
        error: RequestError | None,
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
            failure=error,
        )

    def _prompt_logprobs(self) -> Sequence[TokenLogprobs | None]:
        """Return the prompt's log probabilities once if requested, else nothing.

        The first answer's request has computed the prompt.
        """
        if self.requests[0].params.prompt_logprobs is None or self.has_sent_prompt_logprobs:
            return ()
        self.has_sent_prompt_logprobs = True
        return self.requests[0].prompt_logprobs

    def _usage(self) -> Usage:
        num_output_tokens = sum(request.num_output_tokens for request in self.requests)
        return Usage(self.num_prompt_tokens, num_output_tokens, self.num_cached_tokens)


log = logging.getLogger("octavo.engine")

DETOKENIZATION_FAILED = RequestError("INTERNAL", "detokenization failed; see the server's log")


class ActiveRequests:
    """Active requests by request_id, and their answers by the scheduler's request id."""

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
        """Return whether a request or an answer has this id."""
        return name in self._answers or name in self._live

    @property
    def await_media(self) -> bool:
        """Whether media of any request is still being decoded."""
        return any(live.stream for live in self._live.values())

    def pixels_of(self, name: str) -> Mapping[UnitKey, UnitContent]:
        """Return the pixels of an answer's request that are not encoded yet."""
        return self._answers[name][0].pixels

    def add(self, live: ActiveRequest, names: Sequence[str]) -> None:
        """Register a request. `names`: the scheduler's ids of its answers."""
        self._live[live.request_id] = live
        self._answers |= {name: (live, index) for index, name in enumerate(names)}

    def abort(self, request_id: str) -> list[OutputDelta]:
        """Abort a request. Return the final delta of each unfinished answer; [] if unknown."""
        live = self._live.get(request_id)
        if live is None:
            return []
        status = RequestStatus.FINISHED_ABORTED
        return self.deltas(
            self._scheduler.finish(name, status) or RequestUpdate(name, (), status)
            for name in live.unfinished_names
        )

    def give_up(self, error: RequestError) -> list[OutputDelta]:
        """Finish all requests with an error."""
        return self.deltas(
            RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
            for name in tuple(self._answers)
        )

    def take_media(self) -> list[RequestUpdate]:
        """Pass newly decoded units to the scheduler. Return failures of requests with bad media."""
        failed = []
        for live in self._live.values():
            if live.stream is not None and (error := live.take_units()):
                failed += [
                    RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
                    for name in live.unfinished_names
                ]
        return failed

    def deltas(self, updates: Iterable[RequestUpdate]) -> list[OutputDelta]:
        """Convert scheduler updates to output deltas.

        Updates of finished requests are dropped. An error in one answer fails the request's other
        answers, after their own deltas of this step.
        """
        deltas: list[OutputDelta] = []
        failed: list[tuple[ActiveRequest, RequestError]] = []
        for update in updates:
            if update.request_id in self._answers:
                live, index = self._answers[update.request_id]
                deltas.append(self._delta(live, index, update))
                if failure := deltas[-1].failure:
                    failed.append((live, failure))
        for live, error in failed:
            for name in live.unfinished_names:
                update = RequestUpdate(name, (), RequestStatus.FINISHED_ERROR, error)
                deltas.append(self._delta(*self._answers[name], update))
        return self._stats.take(deltas)

    def _delta(self, live: ActiveRequest, index: int, update: RequestUpdate) -> OutputDelta:
        """Convert one update, and remove the answer if it finished."""
        try:
            delta = live.delta(index, update)
        except Exception:  # internal error: fail only this request
            log.exception("request %r: detokenization failed", live.request_id)
            delta = live.failed(index, DETOKENIZATION_FAILED)
        if delta.finish_reason is not None:
            self._end(update.request_id, update, delta.finish_reason)
            if not live.unfinished:
                live.close()
                del self._live[live.request_id]
        return delta

    def _end(self, name: str, update: RequestUpdate, reason: str) -> None:
        """Remove a finished answer, also from the scheduler. Its id may be reused."""
        del self._answers[name]
        self._matchers.remove(name)
        if not update.status.is_finished or update.error:
            self._scheduler.finish(name, RequestStatus.FINISHED_STOPPED, update.error)
        if self._trace is not None:
            self._trace.end(name, reason)
