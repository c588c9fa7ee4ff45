"""`octavo bench roofline`: each stage of a run against the machine's limits.

Uses one process and one rank without an engine, to measure only the model's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.config.hub import resolve_model
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.model.weights import DenseWeight
from octavo.engine.runner.loader import resolve_dtype, resolve_quantization
from octavo.engine.runner.model_runner import ModelRunner

from ..fakes.tiny_requests import TinyDriver, TinyRequest, image, text, tiny_request
from .machine import INT8, Moment, Sizes, best_seconds, measure_machine, name_of
from .report import Alone, Roofline
from .stages import DECODE, StageClock

CPU = torch.device("cpu")
BLOCK_SIZE, STEP_TOKENS = 16, 2048  # the engine's defaults
DECODE_STEPS, ALONE_ROWS, REPEATS = 8, (1, 16, 128), 3
Shapes = dict[DenseWeight, tuple[int, int]]  # [out, in] of each layer


@dataclass(frozen=True)
class RooflineWorkload:
    """`batch` identical requests; random values stand in for `context` cached tokens."""

    batch: int = 16
    input_len: int = 128
    context: int = 0
    image_size: tuple[int, int] | None = None  # width, height in pixels
    decode_steps: int = DECODE_STEPS


def run_model(
    name: str | None,
    hub: str,
    workload: RooflineWorkload,
    dtype: str,
    quantization: str | None,
) -> Roofline:
    """Call `run` with a checkpoint's folder or hub id; show the progress on stderr."""
    model = resolve_model(name, hub)
    with Console(stderr=True).status("starting") as status:
        return run(model, workload, dtype, quantization, say=status.update)


def run(
    model: Path,
    workload: RooflineWorkload,
    dtype: str = "auto",
    quantization: str | None = None,
    sizes: Sizes | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Roofline:
    """Measure the machine, then the workload.

    Raises ConfigError, or ValueError if the image size is not a multiple of the patch unit.
    """
    config = ModelConfig.from_dir(model)
    check_image(config, workload.image_size)
    kind = resolve_dtype(dtype, CPU, config.dtype)
    say("reading the weights")
    runner = ModelRunner(
        model,
        config,
        PreprocessConfig.from_dir(model),
        CPU,
        kind,
        BLOCK_SIZE,
        TensorParallel(),
        resolve_quantization(quantization or "", CPU),
    )
    shapes = {m: _shape(m) for m in runner.model.decoder.modules() if isinstance(m, DenseWeight)}
    runner.load()  # packs the weights, so shapes are read before
    say("measuring the machine")
    start = Moment.now()
    machine = measure_machine(kind, sizes or Sizes())
    say("running the workload")
    clock, prefill_tokens = measure_run(runner, workload)
    say("running the packed linears alone")
    rows = sorted({*ALONE_ROWS, workload.batch})
    alone = [linears_alone(shapes, kind, count) for count in rows]
    numbers = INT8 if quantization == INT8 else name_of(kind)
    return Roofline.of(
        clock, machine, alone, prefill_tokens, workload.batch, numbers, start.others_share()
    )


def _shape(layer: DenseWeight) -> tuple[int, int]:
    out, size = layer.get_parameter("weight").shape
    return out, size


def check_image(config: ModelConfig, image_size: tuple[int, int] | None) -> None:
    unit = config.vision.patch_size * config.vision.spatial_merge_size
    if image_size and any(side % unit for side in image_size):
        width, height = image_size
        raise ValueError(f"--image-size {width}x{height}: sides must be multiples of {unit}")


def measure_run(runner: ModelRunner, workload: RooflineWorkload) -> tuple[StageClock, int]:
    """Run prefill in steps of STEP_TOKENS, then batched decoding; count the prefilled tokens."""
    requests = [make_request(runner.config, workload, seed) for seed in range(workload.batch + 1)]
    longest = len(requests[0].token_ids) + workload.decode_steps + 2
    num_blocks = len(requests) * -(-longest // BLOCK_SIZE)
    runner.allocate(num_blocks)
    if workload.context:
        fill_cache(runner)
    driver = TinyDriver(runner, num_blocks)
    *rows, first = requests
    prefill(driver, [first])  # warm up page cache and threads
    driver.step([first], [1])
    clock = StageClock(runner)
    with clock.watching():
        tokens = prefill(driver, rows)
        clock.phase = DECODE
        for _ in range(workload.decode_steps):
            driver.step(rows, [1] * len(rows))
    return clock, tokens


def make_request(config: ModelConfig, workload: RooflineWorkload, seed: int) -> TinyRequest:
    parts: list[Any] = [text(seed, workload.context)]
    if workload.image_size:
        width, height = workload.image_size
        parts += image(seed, height, width)
    request = tiny_request(config, [*parts, text(seed + 1, workload.input_len)])
    request.num_computed_tokens = workload.context
    return request


def fill_cache(runner: ModelRunner) -> None:
    """Fill the KV cache with random values, the same in each layer."""
    numbers = torch.randn(runner.caches[0][0].shape, dtype=runner.dtype)
    for pair in runner.caches:
        for cache in pair:
            assert isinstance(cache, torch.Tensor)  # e4m3 caches require a GPU
            cache.copy_(numbers)


def prefill(driver: TinyDriver, requests: Sequence[TinyRequest]) -> int:
    """Compute the prompts in order; return the number of computed tokens."""
    done = 0
    while True:
        rows: list[TinyRequest] = []
        counts: list[int] = []
        for request in requests:
            left = request.num_prompt_tokens - request.num_computed_tokens
            count = min(left, STEP_TOKENS - sum(counts))
            if count > 0:
                rows.append(request)
                counts.append(count)
        if not rows:
            return done
        driver.step(rows, counts)
        done += sum(counts)


@torch.inference_mode()
def linears_alone(shapes: Shapes, dtype: torch.dtype, rows: int) -> Alone:
    """Run each of the decoder's linears and the head once on `rows` rows."""
    inputs = {size: torch.randn(rows, size).to(dtype) for _, size in shapes.values()}

    def work() -> None:
        for layer, (_, size) in shapes.items():
            layer(inputs[size])

    seconds = best_seconds(work, REPEATS)
    operations = sum(2 * rows * out * size for out, size in shapes.values())
    return Alone(rows, seconds, sum(layer.weight.nbytes for layer in shapes), operations)
