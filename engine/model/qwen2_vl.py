"""Qwen2-VL as one rank holds it: the whole vision tower, and its share of the decoder."""

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
    """Built without memory, in `dtype`; `weight_loaders` says what to put where."""

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
        """Every part of every checkpoint tensor that this rank needs."""
        yield from self.decoder.weight_loaders()
        yield from self.visual.weight_loaders()

    def place(self, device: torch.device) -> None:
        """Moves the small tables that no checkpoint holds to the weights' device."""
        self.decoder.inv_freq = self.decoder.inv_freq.to(device)
        self.visual.inv_freq = self.visual.inv_freq.to(device)

    @property
    def weight_bytes(self) -> int:
        """As they are held now, each once; a head that is packed apart from the embedding's rows
        counts beside them."""
        kept = sum(param.nbytes for param in self.parameters())
        return kept + sum(m.packed_bytes for m in self.modules() if isinstance(m, LinearWeight))
