"""Matrix products with weights: the vendor's library on a GPU, oneDNN on a CPU."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, in] × weight [out, in] transposed, plus bias [out]."""
    return torch.nn.functional.linear(x, weight, bias)


def linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)
