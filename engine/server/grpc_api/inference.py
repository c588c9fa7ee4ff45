"""The gRPC service `octavo.v1.Inference`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import grpc

from ....proto import octavo_pb2 as pb
from ....proto import octavo_pb2_grpc
from ....scheduler.params import OptionFields, SamplingParams, truncated_repr
from ...async_llm import AsyncLLM
from ...errors import EngineDead, RequestError
from ...input.processor import Prompt
from ...outputs import OutputDelta
from ...request_stream import join
from ...utils.readers import read
from ..chunked_json import Turns
from ..drain import CallTracker
from ..errors import RequestRejected, error_info
from ..metadata import CallMetadata, checked_request_id, log_trace, read_metadata, request_name
from ..rejections import counted
from .messages import (
    is_large,
    read_options,
    read_prompt,
    read_sampling,
    read_token_prompt,
    refuse_unknown,
    reply_pieces,
    split_delta,
    write_delta,
)
from .status import abort, failure_of

MAX_DELTAS = 64  # deltas of an output to collect before joining them


@dataclass
class _Call:
    """State of a Generate call."""

    request_id: str
    stream: AsyncGenerator[OutputDelta, None]
    fault: RequestError | None = None  # set if it failed after admission
    turns: Turns = field(default_factory=Turns)


class InferenceServicer(octavo_pb2_grpc.InferenceServicer):
    """Implementation of the service. `ApiInterceptor` converts its exceptions to statuses."""

    def __init__(self, engine: AsyncLLM, work: CallTracker | None = None) -> None:
        self._engine = engine
        self._work = work or CallTracker()
        self._turns = Turns()

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateDelta]:
        """Stream a request's deltas.

        gRPC cancels this coroutine when the client disconnects; that closes the stream and aborts
        the request.
        """
        with self._work.call():
            call = await self._start(request, context)
            async with contextlib.aclosing(call.stream):
                async for message in _messages(call):
                    yield message
            if call.fault is not None:
                await abort(context, call.fault)

    async def GenerateOnce(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> bytes:
        """Return a serialized `GenerateReply`, made in pieces because it may have megabytes."""
        with self._work.call():
            call = await self._start(request, context)
            whole = await _gather(call.stream)
            failure = next((each.failure for each in whole if each.failure), None)
            if failure is not None:
                await abort(context, failure)
            return b"".join([piece async for piece in self._turns.paced(reply_pieces(whole))])

    async def _start(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> _Call:
        """Parse and start a request. Raises for requests invalid before preprocessing."""
        with counted(request.request_id, self._engine.engine.stats):
            metadata = read_metadata(context.invocation_metadata() or ())
            reading = functools.partial(self._read, request, metadata, context.time_remaining())
            prompt, params, options = await read(reading, is_large(request))
            name = checked_request_id(request.request_id, "request_id")
            name = name or request_name(metadata.request_id, self._engine.is_running)
        log_trace(name, metadata)
        budget, max_model_len = self._engine.logprob_budget, self._engine.config.max_model_len
        charge = budget.call(params, max_model_len or 0)
        context.add_done_callback(lambda context: charge.close())  # once the response is sent
        stream = self._engine.generate(
            prompt,
            params,
            request_id=name,
            traceparent=metadata.traceparent,
            on_ready=charge.add,
            **options,
        )
        return _Call(name, stream, turns=self._turns)

    def _read(
        self, request: pb.GenerateRequest, metadata: CallMetadata, time_remaining: float | None
    ) -> tuple[Prompt, SamplingParams, OptionFields]:
        """Check and convert a request. Large ones are read in a thread."""
        refuse_unknown(request)
        names = self._engine.engine.served_model_names
        if request.model not in ("", *names):
            text = f"model={truncated_repr(request.model)}: unknown; use one of {', '.join(names)}"
            raise RequestRejected("NOT_FOUND", text, "model")
        options = read_options(request, time_remaining, metadata.priority)
        limits = self._engine.engine.processor.limits
        return read_prompt(request, limits), read_sampling(request.sampling), options

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortReply:
        return pb.AbortReply(found=await self._engine.abort(request.request_id))

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeReply:
        prompt = await read(functools.partial(read_token_prompt, request), is_large(request))
        ids = await self._engine.tokenize(prompt, request.plain)
        return pb.TokenizeReply(ids=ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeReply:
        text = await self._engine.detokenize(request.ids, request.skip_special_tokens)
        return pb.DetokenizeReply(text=text)


async def _messages(call: _Call) -> AsyncIterator[pb.GenerateDelta]:
    """Yield the deltas. After a failure, the last one and `call.fault` have the error."""
    has_started = False
    try:
        async for delta in call.stream:
            has_started = True
            async for message in _written(delta, call.turns):
                if delta.failure and message.HasField("usage"):  # all outputs have finished
                    call.fault = delta.failure
                    message.failure.CopyFrom(failure_of(delta.failure))
                yield message
    except EngineDead as error:
        if not has_started:
            raise
        call.fault = error_info(error)
        yield pb.GenerateDelta(request_id=call.request_id, failure=failure_of(call.fault))


async def _written(delta: OutputDelta, turns: Turns) -> AsyncIterator[pb.GenerateDelta]:
    """Yield a delta's messages: several if it has many log probabilities."""
    if not (delta.logprobs or delta.prompt_logprobs):
        yield write_delta(delta)
        return
    async for message in turns.paced(map(write_delta, split_delta(delta))):
        yield message


async def _gather(stream: AsyncGenerator[OutputDelta, None]) -> list[OutputDelta]:
    """Return complete outputs by index, joining deltas regularly to limit their number."""
    answers: dict[int, list[OutputDelta]] = {}
    async with contextlib.aclosing(stream):
        async for delta in stream:
            deltas = answers.setdefault(delta.index, [])
            deltas.append(delta)
            if len(deltas) > MAX_DELTAS:
                deltas[:] = [join(deltas)]
    return [join(answers[index]) for index in sorted(answers)]
