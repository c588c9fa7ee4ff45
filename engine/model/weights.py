"""Weights of linear layers: loading from parts of checkpoint tensors, and packing.

A layer is built without memory (on torch's `meta` device). Its weight lists, through `loaders`, the
checkpoint tensors that it needs and the target of each part. `finish` is called after the last part
is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ...kernels.linear import Weight, linear, pack_weight

ALL = slice(None)
PAGE = 4096
MAP_FROM_BYTES = (
    1 << 20
)  # smaller tensors are copied, so that changes to the file do not affect them


@dataclass(frozen=True)
class WeightLoader:
    """Mapping of a part of one checkpoint tensor to a parameter on this rank."""

    name: str  # canonical (older) name in the checkpoint
    shape: tuple[int, ...]  # whole tensor in the checkpoint
    owner: nn.Module
    attribute: str  # name of the owner's parameter
    rows: slice = field(default_factory=lambda: ALL)  # target rows of the parameter
    source: tuple[slice, ...] = (ALL,)  # part of the checkpoint's tensor
    columns: slice = field(
        default_factory=lambda: ALL
    )  # target columns of the parameter, if it has two dimensions

    def load(self, part: torch.Tensor, device: torch.device) -> None:
        """Copy `part`, which is `source` of the tensor, to the parameter; allocate it if needed.

        On a CPU, a large part that covers the whole parameter and has its dtype is not copied: the
        parameter becomes a view of the memory-mapped file.
        """
        param = getattr(self.owner, self.attribute)
        if param.is_meta:
            if self._can_map(part, param, device):
                self._assign(part.view(param.shape))
                part.view(-1).view(torch.uint8)[
                    ::PAGE
                ].max()  # read from disk now, not at first use
                return
            param = self._assign(torch.empty_like(param, device=device))
        target = param.data[self.rows]
        if self.columns != ALL:
            target = target[:, self.columns]
        # A scalar may fill many rows: the scale of one layer of a merged layer.
        target.copy_(part if part.numel() == 1 else part.reshape(target.shape))

    def _can_map(self, part: torch.Tensor, param: torch.Tensor, device: torch.device) -> bool:
        same = device.type == "cpu" and part.dtype == param.dtype
        whole = part.numel() == param.numel() and part.is_contiguous()
        return same and whole and part.nbytes >= MAP_FROM_BYTES

    def _assign(self, value: torch.Tensor) -> nn.Parameter:
        param = nn.Parameter(value, requires_grad=False)
        setattr(self.owner, self.attribute, param)
        return param


def empty(*shape: int) -> nn.Parameter:
    """Return an uninitialized parameter; torch's default dtype and device apply."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class DenseWeight(nn.Module):
    """Weight [out, in] and bias [out] of a linear layer; packed on a CPU after loading.

    `out_size` and `in_size` are those of this rank.
    """

    weight: Weight  # a parameter until packed

    def __init__(self, out_size: int, in_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = empty(out_size, in_size)
        self.bias = empty(out_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [n, in] × weightᵀ + bias, [n, out]."""
        return linear(x, self.weight, self.bias)

    def loaders(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = ALL,
        source: tuple[slice, ...] = (ALL,),
    ) -> Iterator[WeightLoader]:
        """Yield loaders of `name`.weight and the bias.

        shape: shape in the checkpoint. source: part to load. rows: target rows.
        """
        yield WeightLoader(f"{name}.weight", shape, self, "weight", rows, source)
        if self.bias is not None:
            yield WeightLoader(f"{name}.bias", shape[:1], self, "bias", rows, source[:1])

    def finish(self, quantization: str | None) -> None:
        """Pack the loaded rows in the layout that the kernels read."""
        self.share(self._parameters["weight"], quantization)

    def share(self, rows: nn.Parameter | None, quantization: str | None) -> None:
        """Pack loaded `rows`, which another module may use too."""
        assert rows is not None, "weight is already packed"
        packed = pack_weight(rows.data, quantization)
        self._parameters.pop("weight", None)
        self.weight = rows if isinstance(packed, torch.Tensor) else packed

    @property
    def packed_bytes(self) -> int:
        """Return the weight's bytes if it is no longer a parameter, else 0."""
        return 0 if "weight" in self._parameters else self.weight.nbytes
