"""Copies of a step's arrays to a rank's device."""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a numpy array of any shape and dtype to `device`."""
    # Arrays that view a message's bytes are read-only, which torch does not support.
    return torch.from_numpy(np.require(array, requirements=("C", "W"))).to(device)
