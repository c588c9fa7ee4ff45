"""The engine: owns one Scheduler and one WorkerGroup and steps them.

`Engine` is for stacks that have a loop of their own: `add_request`, then `step` until nothing is
left. `LLM` and `AsyncLLM` are built on it.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..scheduler.request import Request, RequestStatus, SamplingParams, shown
from ..scheduler.scheduler import Scheduler, SchedulerConfig
from ..scheduler.step import RequestUpdate, StepPlan, StepResult
from .capacity import plan_capacity
from .config import ConfigError, EngineConfig, ModelConfig, PreprocessConfig, generation_defaults
from .hub import resolve_model
from .input.errors import InputError
from .input.media import MediaInfo
from .input.processor import InputProcessor, ProcessedInput
from .output import OutputDelta, TextStream, Usage
from .runner.batch import BatchResult
from .step_input import UnitPixels, build_batch, unit_pixels
from .worker.group import WorkerGroup, WorkerGroupError

log = logging.getLogger("octavo.engine")

Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | ProcessedInput


class EngineDead(RuntimeError):
    """The worker group is gone; the text says why. A new engine is needed."""


class DuplicateRequest(ValueError):
    """A request_id that is in use."""


@dataclass
class _Live:
    """What the engine keeps of a request beside the scheduler's part."""

    request: Request
    pixels: Mapping[tuple[bytes, int], UnitPixels]
    media: tuple[MediaInfo, ...]  # echoed with the first delta, then empty
    stream: TextStream


class Engine:
    """Serves one model. Not thread-safe but for `preprocess`; context manager."""

    def __init__(
        self,
        model: Any = None,
        *,
        hub: str = "huggingface",
        allow_local_files: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> None:
        """Starts the workers and loads the weights; takes seconds.

        `model`: a checkpoint folder, a hub id, or None for the embedded model. `settings`: the
        fields of `EngineConfig`. Raises `ConfigError` for what cannot be served.
        """
        known = [field.name for field in fields(EngineConfig)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"{name}: unknown; settings are {', '.join(known)}")
        asked = EngineConfig(model=resolve_model(model, hub), **settings)
        self.model_config = ModelConfig.from_dir(asked.model)
        self.group = WorkerGroup(asked, on_progress)
        try:
            self._set_up(asked, allow_local_files)
        except BaseException:
            self.group.close()
            raise

    def _set_up(self, asked: EngineConfig, allow_local_files: bool) -> None:
        memory = self.group.memory
        self.num_blocks, max_model_len = plan_capacity(asked, self.model_config, memory)
        self.config = replace(asked, max_model_len=max_model_len)
        self.group.allocate(self.num_blocks)
        self.defaults, self.end_token_ids = generation_defaults(asked.model)
        self.processor = InputProcessor(
            asked.model,
            self.model_config,
            _server_wide(PreprocessConfig.from_dir(asked.model), asked),
            max_model_len,
            allow_local_files=allow_local_files,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=self.num_blocks,
                block_size=asked.block_size,
                max_num_seqs=asked.max_num_seqs,
                max_num_batched_tokens=asked.max_num_batched_tokens,
                max_model_len=max_model_len,
                max_encode_tokens=asked.max_encode_tokens,
                encoder_cache_tokens=asked.encoder_cache_tokens,
            )
        )
        self.failed = ""
        self._live: dict[str, _Live] = {}
        self._names = itertools.count()
        log.info(
            "%s, %s on %s: weights %.2f GB, %d KV blocks of %d tokens (%.2f GB a rank), "
            "max_model_len %d",
            asked.model.name,
            memory.dtype,
            memory.device,
            memory.weight_bytes / 1e9,
            self.num_blocks,
            asked.block_size,
            self.num_blocks * memory.kv_block_bytes / 1e9,
            max_model_len,
        )

    @property
    def worker_pids(self) -> tuple[int, ...]:
        return self.group.pids

    @property
    def has_requests(self) -> bool:
        return bool(self._live)

    def preprocess(
        self,
        prompt: Prompt,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ProcessedInput:
        """Messages, text or token ids made ready. Safe to call from a pool of threads.

        `prompt`: a list of messages, a raw text, or a dict with `prompt` or `prompt_token_ids` and
        maybe `images` and `videos`. Raises `InputError`.
        """
        if isinstance(prompt, ProcessedInput):
            return prompt
        if isinstance(prompt, Mapping):
            return self._preprocess_dict(prompt)
        if isinstance(prompt, str):
            return self.processor.from_text(prompt, images, videos)
        return self.processor.from_messages(prompt, images, videos)

    def _preprocess_dict(self, prompt: Mapping[str, Any]) -> ProcessedInput:
        known = {"prompt", "prompt_token_ids", "messages", "images", "videos"}
        for name in prompt:
            if name not in known:
                raise InputError(name, f"{name}: unknown; a prompt has {', '.join(sorted(known))}")
        media = (prompt.get("images"), prompt.get("videos"))
        kinds = [name for name in ("prompt", "prompt_token_ids", "messages") if name in prompt]
        if len(kinds) != 1:
            raise InputError("prompt", "give one of prompt, prompt_token_ids and messages")
        if kinds == ["prompt"]:
            return self.processor.from_text(prompt["prompt"], *media)
        if kinds == ["messages"]:
            return self.processor.from_messages(prompt["messages"], *media)
        return self.processor.from_token_ids(prompt["prompt_token_ids"], *media)

    def new_request_id(self) -> str:
        """A name that no request of this engine has had."""
        return f"request-{next(self._names)}"

    def add_request(
        self,
        request_id: str | None,
        prompt: Prompt,
        params: SamplingParams | None = None,
    ) -> str:
        """Admits a request and gives its id, drawn when None.

        Raises `InputError` or `AdmissionError` for what cannot be served, `DuplicateRequest` for an
        id in use, `EngineDead` when the workers are gone.
        """
        self.check_alive()
        check_params(params)
        request_id = request_id or self.new_request_id()
        if request_id in self._live:
            raise DuplicateRequest(f"request_id={shown(request_id)}: in use; choose another")
        ready = self.preprocess(prompt)
        request = self._make_request(request_id, ready, self._resolve(params, ready))
        self.scheduler.add(request)
        self._live[request_id] = _Live(
            request,
            unit_pixels(request.units, ready.media, self.model_config.vision.temporal_patch_size),
            tuple(item.info for item in ready.media),
            TextStream(self.processor.tokenizer.backend, request.params.stop),
        )
        return request_id

    def _resolve(self, params: SamplingParams | None, ready: ProcessedInput) -> SamplingParams:
        """Fills in defaults and a seed; the output ends where the model's positions do."""
        params = (params or SamplingParams()).with_defaults(self.defaults)
        used = len(ready.prompt_token_ids) + ready.mrope_position_delta
        room = self.model_config.max_position_embeddings - used
        return replace(
            params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
        )

    def _make_request(
        self, request_id: str, ready: ProcessedInput, params: SamplingParams
    ) -> Request:
        ends = frozenset() if params.ignore_eos else self.end_token_ids
        size = self.config.max_unit_temporal_patches
        return Request(
            request_id=request_id,
            prompt_token_ids=ready.prompt_token_ids,
            params=params,
            units=tuple(unit for span in ready.spans for unit in span.units(size)),
            mrope_positions=ready.mrope_positions,
            mrope_position_delta=ready.mrope_position_delta,
            stop_token_ids=ends | frozenset(params.stop_token_ids),
        )

    def abort(self, request_id: str) -> OutputDelta | None:
        """Ends a request and frees what it holds; its last delta, or None when it is not here."""
        if request_id not in self._live:
            return None
        update = self.scheduler.finish(request_id, RequestStatus.FINISHED_ABORTED)
        return self._delta(update) if update else None

    def step(self) -> list[OutputDelta]:
        """Runs one step and gives what it added to each request.

        Raises `EngineDead` when the worker group fails.
        """
        self.check_alive()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        updates = self.scheduler.update(plan, self._run(plan))
        return [self._delta(update) for update in updates]

    def _run(self, plan: StepPlan) -> StepResult:
        """The plan on the workers; one with nothing in it does not travel."""
        if not (plan.request_ids or plan.encode or plan.drop):
            return StepResult(plan.step_id, ())
        pixels = {p.request_id: self._live[p.request_id].pixels for p in plan.encode}
        batch = build_batch(plan, self.scheduler.requests, pixels, self.group.size)
        try:
            return _step_result(plan, self.group.step(batch, plan.step_id))
        except WorkerGroupError as error:
            raise self._died(error) from None

    def check_workers(self) -> None:
        """Raises `EngineDead` when a worker has ended: for a loop that has nothing to step."""
        try:
            self.group.check_alive()
        except WorkerGroupError as error:
            raise self._died(error) from None

    def _died(self, error: WorkerGroupError) -> EngineDead:
        self.failed = str(error)
        self.group.close()
        return EngineDead(f"the engine stopped: {self.failed}")

    def _delta(self, update: RequestUpdate) -> OutputDelta:
        """Text of an update; a stop string found in it ends the request."""
        live = self._live[update.request_id]
        status = update.status
        text = live.stream.push(update.new_token_ids)
        if status.is_finished:
            text += live.stream.flush()
        if live.stream.stopped and status in (RequestStatus.RUNNING, RequestStatus.FINISHED_LENGTH):
            status = RequestStatus.FINISHED_STOPPED
            self.scheduler.finish(update.request_id, status)
        if status.is_finished:
            del self._live[update.request_id]
        media, live.media = live.media, ()
        return OutputDelta(
            request_id=update.request_id,
            text=text,
            token_ids=update.new_token_ids,
            finish_reason=status.value if status.is_finished else None,
            usage=_usage(live.request) if status.is_finished else None,
            media=media,
            error=update.error,
        )

    def check_alive(self) -> None:
        """Raises `EngineDead` once the engine has failed or was closed."""
        if self.failed:
            raise EngineDead(f"the engine stopped: {self.failed}")

    def close(self) -> None:
        """Ends the workers. Safe to call twice."""
        self.failed = self.failed or "it was closed"
        self.group.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_params(params: Any) -> None:
    if params is not None and not isinstance(params, SamplingParams):
        text = f"must be octavo.SamplingParams, not {type(params).__name__}"
        raise InputError("params", text)


def _server_wide(preprocess: PreprocessConfig, config: EngineConfig) -> PreprocessConfig:
    """The checkpoint's image limits, or the caller's for all requests."""
    low = config.min_pixels or min(preprocess.min_pixels, config.max_pixels or 2**62)
    high = config.max_pixels or max(preprocess.max_pixels, config.min_pixels or 0)
    if low > high:
        raise ConfigError(f"min_pixels={low}: over max_pixels={high}")
    return replace(preprocess, min_pixels=low, max_pixels=high)


def _step_result(plan: StepPlan, result: BatchResult) -> StepResult:
    return StepResult(
        step_id=plan.step_id,
        sampled=tuple(result.sampled.tolist()),
        missing=result.missing,
        errors={plan.request_ids[row]: text for row, text in result.errors},
    )


def _usage(request: Request) -> Usage:
    return Usage(request.num_prompt_tokens, request.num_output_tokens, request.num_cached_tokens)
