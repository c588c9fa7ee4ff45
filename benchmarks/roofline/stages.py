"""Time and work of a run by stage.

Stages are timed from outside by replacing functions of the model with timed wrappers during the
run. On a CPU the functions return after computing, so the times are exact.

Bytes are a lower bound: each weight is read once per step, each block's keys and values once per
row, and a stage's inputs and outputs once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from octavo.engine.model import decoder, vision
from octavo.engine.model.vision import VisionTower
from octavo.engine.model.weights import DenseWeight
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.sampler import Sampler
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.decoder_layers import PanelLayers

VISION, PREFILL, DECODE, HEAD, SAMPLING = "vision", "prefill", "decode", "head", "sampling"
LINEARS, ATTENTION = "linears", "attention"
STAGES = (
    f"{VISION} {LINEARS}", f"{VISION} {ATTENTION}", f"{PREFILL} {LINEARS}",
    f"{PREFILL} {ATTENTION}", f"{DECODE} {LINEARS}", f"{DECODE} {ATTENTION}", HEAD, SAMPLING,
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Bytes moved and operations; a multiply and an add are two operations."""

    bytes: int
    operations: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)


NOTHING = Work(0, 0)
Key = tuple[str, str]  # phase and stage


def linear_work(rows: int, size: int, out: int, item: int, weight_bytes: int) -> Work:
    """Return the work of x [rows, size] × weight [out, size].

    `weight_bytes` is 0 if the weight was read before in this step.
    """
    return Work(weight_bytes + rows * (size + out) * item, 2 * rows * out * size)


def paged_work(
    counts: tuple[int, ...], contexts: tuple[int, ...], heads: int, kv_heads: int, head_dim: int,
    item: int,
) -> Work:  # fmt: skip
    """Return the work of causal attention over row i's last counts[i] of contexts[i] tokens."""
    pairs = sum(
        count * (context - count) + count * (count + 1) // 2
        for count, context in zip(counts, contexts, strict=True)
    )
    numbers = 2 * sum(contexts) * kv_heads * head_dim + 2 * sum(counts) * heads * head_dim
    return Work(numbers * item, 4 * heads * head_dim * pairs)


def vision_work(seqlens: tuple[int, ...], heads: int, head_dim: int, item: int) -> Work:
    """Return the work of full attention within each frame."""
    numbers = 4 * sum(seqlens) * heads * head_dim
    operations = 4 * heads * head_dim * sum(length**2 for length in seqlens)
    return Work(numbers * item, operations)


def sampling_work(rows: int, vocab_size: int, item: int) -> Work:
    """Return the work of reading and comparing each logit once."""
    return Work(rows * vocab_size * item, rows * vocab_size)


@dataclass(eq=False)
class StageClock:
    """Accumulates the time and work of each stage; `phase` is that of the current step."""

    runner: ModelRunner
    phase: str = PREFILL
    seconds: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    work: dict[Key, Work] = field(default_factory=lambda: defaultdict(lambda: NOTHING))
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tower_seconds: float = 0.0  # of the vision tower as a whole
    read: set[int] = field(default_factory=set)  # weights read in this step

    def __post_init__(self) -> None:
        model = self.runner.model
        self._owner = {id(part): VISION for part in model.visual.modules()}
        self._owner[id(model.decoder.head.weight)] = HEAD

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Replace the model's functions by timed wrappers within the context."""
        with ExitStack() as stack:
            for owner, name, wrap in (
                (ModelRunner, "step", self._step),
                (VisionTower, "forward", self._tower),
                (DenseWeight, "forward", self._linear),
                (PanelLayers, "__call__", self._layers),
                (decoder, "paged_attention", self._paged),
                (vision, "vision_attention", self._vision),
                (Sampler, "sample", self._sample),
            ):
                timed = wrap(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    def seconds_of(self, phase: str) -> float:
        """Return the total time of the phase's steps."""
        return sum(self.steps[phase])

    def work_of(self, stage: str) -> Work:
        """Return the work of a stage over all phases."""
        return sum((work for (_, name), work in self.work.items() if name == stage), NOTHING)

    def _timed(self, stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.seconds[self.phase, stage] += time.perf_counter() - start
        return result

    def _count(self, stage: str, work: Work) -> None:
        self.work[self.phase, stage] += work

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(runner: ModelRunner, batch: Any) -> Any:
            self.read.clear()
            start = time.perf_counter()
            result = step(runner, batch)
            self.steps[self.phase].append(time.perf_counter() - start)
            return result

        return timed

    def _tower(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = forward(*arguments)
            self.tower_seconds += time.perf_counter() - start
            return result

        return timed

    def _linear(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(layer: DenseWeight, x: torch.Tensor) -> Any:
            owner = self._owner.get(id(layer), self.phase)
            stage = owner if owner == HEAD else f"{owner} {LINEARS}"
            out = self._timed(stage, lambda: forward(layer, x))
            weight_bytes = 0 if id(layer) in self.read else layer.weight.nbytes
            self.read.add(id(layer))
            sizes = (x.shape[0], x.shape[1], out.shape[1], x.itemsize)
            self._count(stage, linear_work(*sizes, weight_bytes))
            return out

        return timed

    def _layers(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(
            layers: PanelLayers, hidden: torch.Tensor, rotary: Any, batch: AttentionBatch
        ) -> Any:
            seconds = torch.zeros(2, dtype=torch.float64)
            result = call(layers, hidden, rotary, batch, seconds)
            for name, spent in zip((LINEARS, ATTENTION), seconds.tolist(), strict=True):
                self.seconds[self.phase, f"{self.phase} {name}"] += spent
            for weight in layers.weights:
                sizes = (len(hidden), weight.in_size, weight.out_size, hidden.itemsize)
                self._count(f"{self.phase} {LINEARS}", linear_work(*sizes, weight.nbytes))
            shape = (layers.heads, layers.kv_heads, layers.head_dim, hidden.itemsize)
            work = paged_work(batch.num_scheduled_tokens, batch.host_context_lens, *shape)
            for _ in layers.layers:
                self._count(f"{self.phase} {ATTENTION}", work)
            return result

        return timed

    def _paged(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def timed(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, scale: float
        ) -> Any:
            shape = (q.shape[1], k.shape[1], q.shape[2], q.itemsize)
            work = paged_work(batch.num_scheduled_tokens, batch.host_context_lens, *shape)
            stage = f"{self.phase} {ATTENTION}"
            self._count(stage, work)
            return self._timed(stage, lambda: attention(q, k, v, batch, scale))

        return timed

    def _vision(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def timed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
            work = vision_work(rest[1], q.shape[1], q.shape[2], q.itemsize)
            self._count(f"{VISION} {ATTENTION}", work)
            return self._timed(f"{VISION} {ATTENTION}", lambda: attention(q, k, v, *rest))

        return timed

    def _sample(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        def timed(sampler: Sampler, logits: torch.Tensor, *rest: Any) -> Any:
            self._count(SAMPLING, sampling_work(logits.shape[0], logits.shape[1], logits.itemsize))
            return self._timed(SAMPLING, lambda: sample(sampler, logits, *rest))

        return timed
