"""`Engine`: one scheduler and one worker group, driven by `step`.

Use it directly in programs with their own loop: call `add_request`, then `step` until
`has_requests` is False. `LLM` and `AsyncLLM` are built on it.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Unpack

from ...scheduler.params import OptionFields, RequestOptions, SamplingParams, truncated_repr
from ...scheduler.scheduler import Scheduler
from ...scheduler.step import RequestUpdate
from ...scheduler.trace import TraceWriter
from ..config.engine_config import EngineConfig, ModelConfig, check_trace_file
from ..config.generation_config import generation_defaults
from ..config.hub import model_name, resolve_model
from ..errors import WAS_CLOSED, ConfigError, DuplicateRequest, EngineDead, RequestError
from ..input.processor import InputProcessor, InputTimes, ProcessedInput, Prompt
from ..media.settings import MediaSettings, media_settings
from ..model.parallel import check_tensor_parallel_size
from ..observability.stats import EngineStats
from ..outputs import OutputDelta
from ..structured_output.compiler import Grammars
from ..structured_output.matchers import Matchers
from ..utils.lifetime import broken_grpc, close_at_exit, disown_after_fork, reject_pickling
from ..worker.group import WorkerGroup, WorkerGroupError
from ..worker.restarts import Restarts
from .active_requests import ActiveRequest, ActiveRequests
from .kv_capacity import log_capacity, plan_capacity, scheduler_config
from .request_builder import RequestBuilder, check_params
from .step_pipeline import StepPipeline

log = logging.getLogger("octavo.engine")

MEDIA_WAIT = 0.02  # maximum seconds that a step waits if all requests wait for media
LOST = RequestError("INTERNAL", "the scheduler does not know the request")


class Engine:
    """Inference engine of one model. A context manager; only `preprocess` is thread-safe."""

    def __init__(
        self,
        model: Any = None,
        *,
        hub: str = "huggingface",
        on_progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> None:
        """Start the workers and load the weights; takes seconds.

        `model`: a checkpoint folder, a hub id, or None for the embedded model. `settings`: fields
        of `EngineConfig`. Raises `ConfigError` for invalid settings or unsupported checkpoints.
        """
        self.is_disowned = False  # True in forks of the process that created the engine
        self.failed = ""
        if cause := broken_grpc():
            raise ConfigError(cause)
        known = [field.name for field in fields(EngineConfig)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"{name}: unknown setting; use one of {', '.join(known)}")
        asked = EngineConfig(model=resolve_model(model, hub), **settings)
        own = model_name(model, asked.model)
        self.served_model_names = tuple(asked.served_model_name) or (own,)
        self.model_config = ModelConfig.from_dir(asked.model)
        check_tensor_parallel_size(self.model_config, asked.tensor_parallel_size)
        media = media_settings(asked, self.model_config)
        check_trace_file(asked.trace_file)
        self.group = WorkerGroup(asked, on_progress)
        disown_after_fork(self)
        try:
            self._set_up(asked, media)
            close_at_exit(self)
        except BaseException:
            self.group.close()
            raise

    def _set_up(self, asked: EngineConfig, media: MediaSettings) -> None:
        memory = self.group.memory
        self.num_blocks, max_model_len = plan_capacity(asked, self.model_config, memory)
        self.config = replace(asked, max_model_len=max_model_len)
        self.group.allocate(self.num_blocks)
        self.processor = InputProcessor(
            asked.model,
            self.model_config,
            media.preprocess,
            max_model_len,
            asked.max_unit_temporal_patches,
            media.access,
            media.limits,
            media.defaults,
        )
        self._builder = RequestBuilder(
            *generation_defaults(asked.model),
            self.model_config.max_position_embeddings,
            asked.max_unit_temporal_patches,
            self.model_config.vocab_size,
            self.processor.bad_word_ids,
        )
        self.grammars = Grammars(
            self.processor.tokenizer.backend,
            self.model_config.vocab_size,
            self._builder.end_token_ids,
            self.model_config.vision_token_ids,
        )
        self.scheduler = Scheduler(scheduler_config(self.config, self.num_blocks, memory.device))
        self._trace = TraceWriter(asked.trace_file, self.scheduler) if asked.trace_file else None
        self.stats = EngineStats(self.scheduler, self.group)
        self._matchers = Matchers()
        self.requests = ActiveRequests(self.scheduler, self.stats, self._matchers, self._trace)
        self._pipeline = StepPipeline(
            self.scheduler,
            self.group,
            self.requests.pixels_of,
            self._trace,
            asked.overlap_steps,
            self.stats,
            self._matchers,
        )
        self.restarts = Restarts(self.group, asked.max_restarts)
        self._names = itertools.count()
        self._arrived = threading.Event()  # set when media units were decoded
        log_capacity(self.config, memory, self.num_blocks)

    @property
    def host_kv_bytes(self) -> int:
        """Bytes of this machine's memory that the KV cache will use, allocated page by page."""
        memory = self.group.memory
        if memory.device != "cpu" or self.config.workers:
            return 0
        return self.num_blocks * memory.kv_block_bytes * self.config.tensor_parallel_size

    @property
    def model_name(self) -> str:
        """The model name in responses: the first of `served_model_names`."""
        return self.served_model_names[0]

    @property
    def worker_pids(self) -> tuple[int, ...]:
        return self.group.pids

    @property
    def has_requests(self) -> bool:
        return bool(self.requests)

    @property
    def has_steps(self) -> bool:
        """Whether a step is in flight, possibly of finished requests."""
        return not self._pipeline.is_idle

    def preprocess(
        self,
        prompt: Prompt,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ProcessedInput:
        """Preprocess a prompt. Thread-safe.

        See `InputProcessor.from_prompt` for the prompt formats. Raises `InputError`.
        """
        self.check_owner()
        return self.processor.from_prompt(prompt, images, videos)

    def new_request_id(self) -> str:
        """Return an id that no active request has."""
        return next(n for i in self._names if (n := f"request-{i}") not in self.requests)

    def add_request(
        self,
        request_id: str | None,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **given: Unpack[OptionFields],
    ) -> str:
        """Admit a request and return its id, which is generated if None.

        Options are the fields of `octavo.RequestOptions`; `timeout_s` counts from this call.
        Raises `InputError` or `AdmissionError` for invalid requests, `QueueFull` if a retry may
        succeed, `DuplicateRequest` for an id in use, and `EngineDead` if the engine has stopped.
        """
        asked_at = time.monotonic()
        self.check_alive()
        check_params(params)
        options = RequestOptions.of(**given)
        deadline = math.inf
        if options.timeout_s is not None:
            deadline = self.scheduler.clock() + options.timeout_s
        request_id = request_id or self.new_request_id()
        count = 1 if params is None else params.n
        names = [request_id, *(f"{request_id}[{index}]" for index in range(1, count))]
        for name in names:
            if name in self.requests:
                raise DuplicateRequest(f"request_id={truncated_repr(name)}: in use; choose another")
        ready = self.preprocess(prompt)
        grammar = ready.grammar
        if params is not None and params.structured is not None and grammar is None:
            grammar = self.grammars.compile(params.structured)
        requests = self._builder.make(names, ready, params, options, deadline)
        infos = tuple(item.info for item in ready.media)
        tokenizer = self.processor.tokenizer.backend
        times = (ready.times if infos else None) or InputTimes(0.0, 0.0)
        live = ActiveRequest(request_id, requests, infos, tokenizer, times, ready.stream)
        live.supply(ready.units)
        self.scheduler.add(*requests)  # Last of the calls that raise: a rejection leaves no state.
        if grammar is not None:
            self._matchers.add(requests, grammar)
        if ready.stream is not None:
            ready.stream.on_arrival = self._arrived.set
        self.stats.add(request_id, requests, ready, asked_at)
        self.requests.add(live, names)
        return request_id

    def abort(self, request_id: str) -> list[OutputDelta]:
        """Abort a request and free its resources.

        Returns the final delta of each unfinished answer; [] if the id is unknown.
        """
        self.check_owner()
        return self.requests.abort(request_id)

    def step(self) -> list[OutputDelta]:
        """Send the next step to the workers, and return the deltas of the previous step.

        The first call returns no deltas. Without `overlap_steps`, the deltas are those of the step
        just sent. Raises `EngineDead` if the workers fail too often.
        """
        self.check_alive()
        self._arrived.clear()
        updates = [*self.requests.take_media(), *self.scheduler.expire()]
        try:
            updates += self._pipeline.step()
        except WorkerGroupError as error:
            updates += self._recover(error)
        deltas = self.requests.deltas(updates)
        self._pipeline.settle()
        if self._pipeline.is_idle and not self.scheduler.requests:
            deltas += self.requests.give_up(LOST)  # should never happen
        if self._pipeline.is_starved and self.requests.await_media:
            self._arrived.wait(MEDIA_WAIT)
        return deltas

    def check_workers(self) -> None:
        """Restart dead workers. Called by idle step loops."""
        self.check_owner()
        try:
            self.group.check_alive()
        except WorkerGroupError as error:
            self._recover(error)

    def _recover(self, error: WorkerGroupError) -> list[RequestUpdate]:
        """Restart the workers and requeue running requests for recomputation.

        Returns the final updates of requests that caused the crash. Raises `EngineDead` if the
        restart limit is exceeded.
        """
        try:
            self.restarts.restart(error)
        except WorkerGroupError as last:
            raise self._died(last) from None
        self.stats.reset_after_worker_restart(self.restarts.total)
        return self._pipeline.reset_after_worker_restart()

    def _died(self, error: WorkerGroupError) -> EngineDead:
        self.failed = self.failed or str(error)
        self.group.close()
        return EngineDead(self.failed)

    def check_alive(self) -> None:
        """Raise `EngineDead` if the engine has failed or was closed."""
        if self.failed:
            raise EngineDead(self.failed)

    def check_owner(self) -> None:
        """Raise `EngineDead` in a fork of the process that created the engine."""
        if self.is_disowned:
            raise EngineDead(self.failed)

    def disown(self, cause: str) -> None:
        """Reject further use. Called in a forked process; the group disowns its workers."""
        self.is_disowned, self.failed = True, cause

    def close(self) -> None:
        """Stop the workers, also while another thread restarts them.

        No-op if closed already or in a forked process.
        """
        if self.is_disowned:
            return
        self.failed = self.failed or WAS_CLOSED
        self.grammars.close()
        self.group.close()
        if self._trace is not None:
            self._trace.close()

    def __reduce__(self) -> Any:
        return reject_pickling("octavo.Engine")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
