"""Throughput of the engine on random prompts, all there from the start."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from octavo.engine.engine import Engine
from octavo.engine.progress import loading_bar
from octavo.scheduler.params import SamplingParams


@dataclass(frozen=True)
class Workload:
    input_len: int  # text tokens of each prompt
    output_len: int
    num_prompts: int
    image_size: tuple[int, int] | None = None  # width, height

    @classmethod
    def parse(
        cls, input_len: int, output_len: int, num_prompts: int, image_size: str | None
    ) -> Workload:
        """Raises ValueError naming the option."""
        given = {"input-len": input_len, "output-len": output_len, "num-prompts": num_prompts}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        match = re.fullmatch(r"(\d+)x(\d+)", image_size or "1x1")
        if match is None:
            raise ValueError(f"--image-size {image_size}: must be WIDTHxHEIGHT, such as 448x448")
        size = (int(match[1]), int(match[2])) if image_size else None
        return cls(input_len, output_len, num_prompts, size)

    def prompts(self, engine: Engine, seed: int = 0) -> list[dict[str, Any]]:
        """Random token ids, the same in every run; one random image before them where asked."""
        rng = np.random.default_rng(seed)
        config = engine.model_config
        special = {*config.vision_token_ids, *engine.processor.tokenizer.added.values()}
        plain = np.array([i for i in range(config.vocab_size) if i not in special])
        made = []
        for _ in range(self.num_prompts):
            prompt: dict[str, Any] = {
                "prompt_token_ids": rng.choice(plain, self.input_len).tolist()
            }
            if self.image_size:
                shape = (self.image_size[1], self.image_size[0], 3)
                prompt["images"] = [Image.fromarray(rng.integers(0, 256, shape, np.uint8))]
                head = [config.vision_start_token_id, config.image_token_id]
                prompt["prompt_token_ids"][:0] = [*head, config.vision_end_token_id]
            made.append(prompt)
        return made


@dataclass(frozen=True)
class Report:
    """Times in seconds; the percentiles are over requests."""

    num_prompts: int
    prompt_tokens: int
    output_tokens: int
    preprocess_seconds: float
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    prefill_tokens_per_second: float  # until the last request's first token
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        return "\n".join(
            [
                f"{self.num_prompts} requests, {self.prompt_tokens:,} tokens in, "
                f"{self.output_tokens:,} out, {self.seconds:.2f} s",
                f"  {self.requests_per_second:.2f} req/s, "
                f"{self.output_tokens_per_second:.1f} tok/s out, "
                f"{self.total_tokens_per_second:.1f} tok/s in all",
                f"  TTFT p50 {self.ttft_p50 * 1e3:.0f} ms, p99 {self.ttft_p99 * 1e3:.0f} ms; "
                f"TPOT p50 {self.tpot_p50 * 1e3:.1f} ms, p99 {self.tpot_p99 * 1e3:.1f} ms",
            ]
        )


def run(workload: Workload, settings: dict[str, Any]) -> Report:
    """Starts an engine, warms it with one request that is not of the workload, then measures."""
    with loading_bar() as on_progress:
        engine = Engine(on_progress=on_progress, **settings)
    with engine:
        started = time.perf_counter()
        prompts = [engine.preprocess(prompt) for prompt in workload.prompts(engine)]
        preprocess_seconds = time.perf_counter() - started
        params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
        warm_up = engine.preprocess(workload.prompts(engine, seed=1)[0])  # a picture of its own
        _measure(engine, [warm_up], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        return _report(*_measure(engine, prompts, params), preprocess_seconds)


@dataclass
class _Times:
    prompt_tokens: int
    first: float = 0.0
    last: float = 0.0
    output_tokens: int = 0


def _measure(
    engine: Engine, prompts: Sequence[Any], params: SamplingParams
) -> tuple[list[_Times], float]:
    """Runs the prompts; times since the start of each one's first and last token."""
    started = time.perf_counter()
    times = {
        engine.add_request(None, prompt, params): _Times(len(prompt.prompt_token_ids))
        for prompt in prompts
    }
    while engine.has_requests:
        deltas = engine.step()
        now = time.perf_counter() - started
        for delta in deltas:
            if delta.error:
                raise ValueError(delta.error)
            entry = times[delta.request_id]
            entry.first = entry.first or now
            entry.last = now
            entry.output_tokens += len(delta.token_ids)
    return list(times.values()), time.perf_counter() - started


def _report(times: list[_Times], seconds: float, preprocess_seconds: float) -> Report:
    prompt_tokens = sum(entry.prompt_tokens for entry in times)
    output_tokens = sum(entry.output_tokens for entry in times)
    ttft = [entry.first for entry in times]
    tpot = [(e.last - e.first) / max(1, e.output_tokens - 1) for e in times]
    return Report(
        num_prompts=len(times),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        preprocess_seconds=preprocess_seconds,
        seconds=seconds,
        requests_per_second=len(times) / seconds,
        output_tokens_per_second=output_tokens / seconds,
        total_tokens_per_second=(prompt_tokens + output_tokens) / seconds,
        prefill_tokens_per_second=prompt_tokens / max(ttft),
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p99=float(np.percentile(ttft, 99)),
        tpot_p50=float(np.percentile(tpot, 50)),
        tpot_p99=float(np.percentile(tpot, 99)),
    )
