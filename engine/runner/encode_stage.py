"""Vision encode stage: encodes units, distributed over the ranks, and shares the embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...kernels.patches import cut_patches
from ...scheduler.request import UnitKey
from ..config.engine_config import ModelConfig, PreprocessConfig
from ..model.parallel import TensorParallel
from ..model.vision import VisionTower
from .batch import EncodeTask
from .tensors import to_device

# Patches per pass of the tower. Measured with the 2B shape on two cores: eight images of 1,024
# patches take 7 % longer in one pass than in eight.
CPU_PATCHES = 1024


@dataclass(frozen=True)
class EncodeStage:
    """Encoder of one rank."""

    visual: VisionTower
    config: ModelConfig
    preprocess: PreprocessConfig
    parallel: TensorParallel
    device: torch.device
    dtype: torch.dtype

    def run(self, tasks: tuple[EncodeTask, ...]) -> dict[UnitKey, torch.Tensor]:
        """Encode this rank's units, and return the embeddings of all ranks by unit key."""
        ranks = range(self.parallel.size)
        assigned = [[task for task in tasks if task.rank == rank] for rank in ranks]
        mine = assigned[self.parallel.rank]
        # Encode before the first broadcast, which blocks on its sender, so ranks run in parallel.
        embedded = self._embed_units(mine) if mine else None
        found: dict[UnitKey, torch.Tensor] = {}
        for rank, units in enumerate(assigned):
            if not units:
                continue
            counts = [self._num_tokens(task) for task in units]
            if embedded is not None and rank == self.parallel.rank:
                joined = embedded
            else:
                shape = (sum(counts), self.config.hidden_size)
                joined = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.parallel.broadcast(joined, rank)
            for task, part in zip(units, joined.split(counts), strict=True):
                # A view would keep the memory of all units alive.
                found[task.key] = part.clone() if len(units) > 1 else part
        return found

    def _embed_units(self, units: list[EncodeTask]) -> torch.Tensor:
        """Return embeddings of units in order: from the tower, or supplied by the caller."""
        seen = [task for task in units if task.embeds is None]
        if len(seen) == len(units):
            return self._encode_units(units)
        counts = [self._num_tokens(task) for task in seen]
        left = iter(self._encode_units(seen).split(counts) if seen else ())
        return torch.cat([self._supplied(t) if t.embeds is not None else next(left) for t in units])

    def _supplied(self, task: EncodeTask) -> torch.Tensor:
        """Return a caller-supplied embedding in the model's dtype.

        If its shape does not match the unit's grid, return NaN.
        """
        shape = (self._num_tokens(task), self.config.hidden_size)
        if task.embeds is None or task.embeds.shape != shape:
            return torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        return to_device(task.embeds, self.device).to(self.dtype)

    def _encode_units(self, units: list[EncodeTask]) -> torch.Tensor:
        """Encode units; on a CPU, few patches per pass.

        Intermediate results then stay in the CPU cache.
        """
        passes = passes_of(units, CPU_PATCHES) if self.device.type == "cpu" else [units]
        made = [self._encode_pass(some) for some in passes]
        return torch.cat(made) if len(made) > 1 else made[0]

    def _encode_pass(self, units: list[EncodeTask]) -> torch.Tensor:
        patches = torch.cat([self._patches(task) for task in units])
        return self.visual(patches, [task.grid_thw for task in units])

    def _patches(self, task: EncodeTask) -> torch.Tensor:
        """Return the unit's patches [t × h × w, patch_dim].

        If the pixels do not match the unit's grid, return NaN. Units do not affect each other, so
        only the requests that use this one fail.
        """
        vision, preprocess = self.config.vision, self.preprocess
        frames, height, width = task.grid_thw
        patch, both = vision.patch_size, vision.temporal_patch_size
        counts = (1, both) if frames == 1 else (frames * both,)  # an image has one frame
        fit = [(count, height * patch, width * patch, 3) for count in counts]
        if task.pixels is None or task.pixels.shape not in fit:
            shape = (frames * height * width, vision.patch_dim)
            return torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        return cut_patches(
            to_device(task.pixels, self.device),
            preprocess.image_mean,
            preprocess.image_std,
            patch,
            both,
            vision.spatial_merge_size,
            self.dtype,
        )

    def _num_tokens(self, task: EncodeTask) -> int:
        frames, height, width = task.grid_thw
        return frames * height * width // self.config.vision.spatial_merge_size**2


def passes_of(units: list[EncodeTask], most: int) -> list[list[EncodeTask]]:
    """Split units, in order, into passes of at most `most` patches and at least one unit."""
    passes: list[list[EncodeTask]] = []
    for unit in units:
        some = passes[-1] if passes else []
        if some and sum(math.prod(each.grid_thw) for each in (*some, unit)) <= most:
            some.append(unit)
        else:
            passes.append([unit])
    return passes
