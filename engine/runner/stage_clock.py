"""How long a stage of a step took where it ran."""

from __future__ import annotations

import time

import torch


class StageClock:
    """Between two calls of `mark`. On a GPU by its own events: the host only launches there."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        if not self._is_gpu:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    @property
    def seconds(self) -> float:
        """To be asked once the device is done with the stage."""
        if not self._is_gpu:
            return self._times[1] - self._times[0]
        return self._events[0].elapsed_time(self._events[1]) / 1e3
