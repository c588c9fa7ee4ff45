"""Timing of a stage of a step on its device."""

from __future__ import annotations

import time

import torch


class StageClock:
    """Time between two calls of `mark`.

    On a GPU it uses CUDA events, since the host only launches the stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Record the time, on the device's stream if it is a GPU."""
        if not self._is_gpu:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    @property
    def seconds(self) -> float:
        """Return the duration. On a GPU, call it after the stage has finished."""
        if not self._is_gpu:
            return self._times[1] - self._times[0]
        return self._events[0].elapsed_time(self._events[1]) / 1e3
