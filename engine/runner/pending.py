"""Asynchronous copy of a step's result to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...scheduler.errors import RequestError
from ...scheduler.request import UnitKey
from .batch import BatchResult, InputBatch, Int32
from .logprobs import LogprobTensors
from .sampler import FORBIDDEN, NONE_LEFT, NOT_FINITE
from .stage_clock import StageClock

SKIPPED = -2  # sampled by a row that was skipped; -1 is sampled from non-finite logits


@dataclass(frozen=True)
class PendingResult:
    """Result of a step, possibly still being copied from the device."""

    sampled: torch.Tensor  # int64 [s] on the host
    rows: Int32  # [s] rows that sample
    missing: tuple[UnitKey, ...]
    errors: tuple[tuple[int, RequestError], ...]
    arrived: torch.cuda.Event | None  # None: the copy is complete
    of_drawn: LogprobTensors | None = None
    of_prompt: LogprobTensors | None = None
    encode_clock: StageClock | None = None  # None: nothing was encoded

    @classmethod
    def of(
        cls,
        sampled: torch.Tensor,
        batch: InputBatch,
        missing: Sequence[tuple[int, UnitKey]],
        errors: Sequence[tuple[int, RequestError]],
        of_drawn: LogprobTensors | None = None,
        of_prompt: LogprobTensors | None = None,
        encode_clock: StageClock | None = None,
    ) -> PendingResult:
        """Start the copy to the host, in parallel with later steps."""
        host, arrived = sampled, None
        if sampled.is_cuda:
            host = _on_host(sampled)
            of_drawn = of_drawn and of_drawn.moved(_on_host)
            of_prompt = of_prompt and of_prompt.moved(_on_host)
            arrived = torch.cuda.Event()
            arrived.record()
        keys = tuple(dict.fromkeys(key for _, key in missing))
        rows = batch.sampling.rows
        return cls(host, rows, keys, tuple(errors), arrived, of_drawn, of_prompt, encode_clock)

    def wait(self) -> BatchResult:
        """Wait for the copy, and return the result."""
        if self.arrived is not None:
            self.arrived.synchronize()
        sampled = self.sampled.numpy().astype(np.int32)
        errors = self.errors
        for value, error in ((-1, NOT_FINITE), (FORBIDDEN, NONE_LEFT)):
            bad = self.rows[sampled == value].tolist()
            errors = (*errors, *((row, error) for row in bad))
        return BatchResult(
            np.maximum(sampled, -1),
            self.missing,
            errors,
            self.of_drawn.finished() if self.of_drawn else None,
            self.of_prompt.finished() if self.of_prompt else None,
            self.encode_clock.seconds if self.encode_clock else 0.0,
        )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start an asynchronous copy to pinned host memory."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
