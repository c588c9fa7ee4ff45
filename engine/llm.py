"""`LLM`: offline batch inference, blocking the calling thread."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Unpack

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..scheduler.params import OptionFields, RequestOptions, SamplingParams
from .core.engine import Engine
from .core.request_builder import Deadline, check_params
from .core.tool_call_stream import ToolCallStream
from .errors import EngineDead, InputError, PreprocessTimeout, QueueFull
from .input.parsed_prompt import NO_TOOLS
from .input.preprocess_pool import InputJob, InputPool
from .input.processor import ProcessedInput, Prompt, parse
from .outputs import Output, OutputDelta, RequestOutput
from .utils.daemon_pool import DaemonPool
from .utils.lifetime import close_at_exit, reject_pickling
from .utils.progress import loading_bar

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """Blocking interface to a Qwen2-VL model. A context manager.

    `model`: a checkpoint folder, a hub id, or None for the small embedded model. Other settings
    are the fields of `octavo.EngineConfig` (`device`, `dtype`, `tensor_parallel_size`,
    `max_model_len`, `max_pixels`, ...).
    """

    def __init__(self, model: Any = None, **settings: Any) -> None:
        """Start the workers and load the weights. Raises `ConfigError`."""
        # Steps run on a separate thread so that Ctrl-C cannot interrupt one.
        self._stepper = DaemonPool(1, "step")
        self._step: Future[list[OutputDelta]] = Future()  # the latest step
        self._step.set_result([])
        self._in_use = threading.Lock()
        with loading_bar() as on_progress:
            self.engine = Engine(model, on_progress=on_progress, **settings)
        self._pool = InputPool(
            self.engine.processor,
            self.engine.config.isolate_media,
            grammars=self.engine.grammars,
            claimed_bytes=self.engine.host_kv_bytes,
        )
        close_at_exit(self)

    def chat(
        self,
        messages: Sequence[Any],
        params: Params = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        progress: bool = True,
        **options: Unpack[OptionFields],
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, in the format of the model card.

        `images` and `videos` fill `{"type": "image"}` and `{"type": "video"}` parts without a
        source; for a list of conversations, pass one list per conversation. `tools` are OpenAI
        tools for all conversations; the calls are returned in each output's `tool_calls`.
        `tool_choice` is "auto", "none", "required" or OpenAI's object that names a function;
        `parallel_tool_calls=False` allows at most one call. `options` are `priority`, `timeout_s`
        and `cache_salt` of `octavo.RequestOptions`.

        Raises `InputError` if a single conversation is invalid. In a list, an invalid
        conversation finishes with finish_reason "error" and `error` set; the others continue.
        """
        tool_fields: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice}
        tool_fields |= {"parallel_tool_calls": parallel_tool_calls}
        clock = Deadline(RequestOptions.of(**options))
        if not _is_batch(messages):
            prompt: dict[str, Any] = {"messages": messages, "images": images, "videos": videos}
            return self._run([prompt | tool_fields], params, clock, progress, alone=True)
        for name, given in (("images", images), ("videos", videos)):
            if given is not None and len(given) != len(messages):
                raise ValueError(
                    f"{name}: {len(given)} lists for {len(messages)} conversations; "
                    "pass one list per conversation"
                )
        prompts = [
            {"messages": conversation, "images": _at(images, i), "videos": _at(videos, i)}
            | tool_fields
            for i, conversation in enumerate(messages)
        ]
        return self._run(prompts, params, clock, progress, alone=False)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool = True,
        **options: Unpack[OptionFields],
    ) -> list[RequestOutput]:
        """Complete one raw prompt or a list of them. Options and errors as in `chat`.

        A prompt is a string, or a dict with `prompt` or `prompt_token_ids` and optionally
        `images` and `videos`.
        """
        clock = Deadline(RequestOptions.of(**options))
        if isinstance(prompts, str | Mapping | ProcessedInput):
            return self._run([prompts], params, clock, progress, alone=True)
        if not isinstance(prompts, Sequence):
            text = f"must be a string, a dict or a list of them, not {type(prompts).__name__}"
            raise InputError("prompts", text)
        return self._run(list(prompts), params, clock, progress, alone=False)

    def _run(
        self, prompts: list[Any], params: Params, clock: Deadline, progress: bool, alone: bool
    ) -> list[RequestOutput]:
        """Answer all prompts. Calls from several threads run one after another."""
        self.engine.check_owner()  # before the lock, which a fork may have left held
        with self._in_use:
            return self._answer(prompts, params, clock, progress, alone)

    def _answer(
        self, prompts: list[Any], params: Params, clock: Deadline, progress: bool, alone: bool
    ) -> list[RequestOutput]:
        self.engine.check_alive()
        each = _params_of_each(params, len(prompts))
        names = [self.engine.new_request_id() for _ in prompts]
        results = {
            name: RequestOutput(name, outputs=[Output(i) for i in range(1 if p is None else p.n)])
            for name, p in zip(names, each, strict=True)
        }
        calls: dict[str, ToolCallStream] = {}
        waiting: deque[tuple[str, InputJob, SamplingParams | None]] = deque()
        for name, prompt, sampling in zip(names, prompts, each, strict=True):
            try:
                parsed = parse(prompt)
                sampling = parsed.tools.with_grammar(sampling)
            except InputError as error:
                if alone:
                    raise
                results[name].fail(str(error))
                continue
            calls[name] = ToolCallStream(parsed.tools)
            waiting.append((name, self._pool.submit(parsed, sampling), sampling))
        jobs = [job for _, job, _ in waiting]
        try:
            of_one = calls[names[0]] if alone else ToolCallStream(NO_TOOLS)
            with of_one.naming(), _answer_bar(len(prompts), progress and not alone) as advance:
                while waiting or self.engine.has_requests:
                    self._admit(waiting, results, clock, alone)
                    self._step = self._submit_step()
                    for delta in self._step.result():
                        if delta.request_id in results:  # otherwise added to `engine` directly
                            delta = calls[delta.request_id].read(delta)
                            results[delta.request_id].add(delta)
                    advance(sum(result.is_finished for result in results.values()))
        except BaseException:
            wait([self._step])
            for name in names:
                self.engine.abort(name)
            raise
        finally:
            for job in jobs:
                job.cancel()
        return [results[name] for name in names]

    def _submit_step(self) -> Future[list[OutputDelta]]:
        try:
            return self._stepper.submit(self.engine.step)
        except RuntimeError:  # another thread closed the pool
            self.engine.check_alive()
            raise

    def _admit(
        self,
        waiting: deque[tuple[str, InputJob, SamplingParams | None]],
        results: dict[str, RequestOutput],
        clock: Deadline,
        alone: bool,
    ) -> None:
        """Admit preprocessed requests in order until the queue is full.

        Waits for the first one only if the engine is idle.
        """
        while waiting and (waiting[0][1].future.done() or not self.engine.has_requests):
            name, job, sampling = waiting.popleft()
            try:
                ready = _wait_ready(job.future, clock)
                results[name].prompt_token_ids = ready.prompt_token_ids.tolist()
                self.engine.add_request(name, ready, sampling, **vars(clock.left))
            except QueueFull:
                waiting.appendleft((name, job, sampling))
                return
            except PreprocessTimeout as error:
                job.cancel()
                results[name].fail(str(error.reason))
            except Exception as error:  # mostly InputError or AdmissionError; fails this prompt
                if alone or isinstance(error, EngineDead):
                    raise
                results[name].fail(str(error) or type(error).__name__)

    def close(self) -> None:
        """Stop the workers. No-op if closed already or in a forked process."""
        if hasattr(self, "engine"):
            if self.engine.is_disowned:
                return
            self.engine.close()
        self._stepper.close()
        if hasattr(self, "_pool"):
            self._pool.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return reject_pickling("octavo.LLM")

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _is_batch(messages: Sequence[Any]) -> bool:
    """Return whether `messages` is a list of conversations. Raises `InputError` if neither."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    if not is_list or (messages and all(isinstance(each, str | bytes) for each in messages)):
        text = "must be a list of dicts with role and content, or a list of such lists"
        raise InputError("messages", text)
    return bool(messages) and not any(isinstance(message, Mapping) for message in messages)


def _at(values: Sequence[Any] | None, index: int) -> Any:
    return None if values is None else values[index]


def _wait_ready(future: Future[ProcessedInput], clock: Deadline) -> ProcessedInput:
    """Wait for preprocessing. Raises `PreprocessTimeout` if the deadline passes first."""
    wait([future], clock.left.timeout_s)
    if not future.done():
        raise PreprocessTimeout
    return future.result()


def _params_of_each(params: Params, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple):
        check_params(params)
    for each in params:
        check_params(each)
    if len(params) != count:
        raise ValueError(f"params: {len(params)} for {count} prompts; pass one, or one per prompt")
    return list(params)


@contextlib.contextmanager
def _answer_bar(total: int, shown: bool) -> Iterator[Any]:
    """Show a progress bar of finished answers if stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich.console import Console

    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda done: bar.update(task, completed=done)
