"""Arrays of a step on a rank's device."""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    # arrays over a message's bytes are read-only, which torch does not know
    return torch.from_numpy(np.require(array, requirements=("C", "W"))).to(device)
