"""Qwen2-VL on one rank: the whole vision tower, and a shard of the decoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..config.engine_config import ModelConfig
from .decoder import Decoder
from .parallel import TensorParallel, check_tensor_parallel_size
from .quantized import LinearWeight
from .vision import VisionTower
from .weights import WeightLoader


class Qwen2VL(nn.Module):
    """Model without memory (on torch's `meta` device), in `dtype`.

    `weight_loaders` lists what to load. Raises ConfigError if `parallel.size` ranks cannot share
    the checkpoint.
    """

    def __init__(self, config: ModelConfig, parallel: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        check_tensor_parallel_size(config, parallel.size)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                self.visual = VisionTower(config.vision)
                self.decoder = Decoder(config, parallel)
        finally:
            torch.set_default_dtype(previous)

    def weight_loaders(self) -> Iterator[WeightLoader]:
        """Yield every part of every checkpoint tensor that this rank needs."""
        yield from self.decoder.weight_loaders()
        yield from self.visual.weight_loaders()

    def place(self, device: torch.device) -> None:
        """Move the rotary frequencies, which are in no checkpoint, to `device`."""
        self.decoder.inv_freq = self.decoder.inv_freq.to(device)
        self.visual.inv_freq = self.visual.inv_freq.to(device)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights in their current layout, shared ones counted once.

        If the LM head is packed separately from tied embedding rows, both count.
        """
        kept = sum(param.nbytes for param in self.parameters())
        return kept + sum(m.packed_bytes for m in self.modules() if isinstance(m, LinearWeight))
