"""Weights of linear layers: where the parts of a checkpoint's tensors go, and their final form.

A layer is built without memory (on torch's `meta` device). Its weight names, through `loaders`, the
checkpoint tensors that it wants and which part of each goes where; `finish` is called once the last
part is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ...kernels.linear import Weight, linear, pack_weight

ALL = slice(None)
PAGE = 4096
MAP_FROM_BYTES = 1 << 20  # smaller tensors are copied, and are then safe from changes to the file


@dataclass(frozen=True)
class WeightLoader:
    """Where a part of one checkpoint tensor goes on this rank."""

    name: str  # in the checkpoint's older form
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    owner: nn.Module
    attribute: str  # the owner's parameter
    rows: slice = field(default_factory=lambda: ALL)  # of the parameter
    source: tuple[slice, ...] = (ALL,)  # of the checkpoint's tensor
    columns: slice = field(default_factory=lambda: ALL)  # of the parameter, if it has any

    def load(self, part: torch.Tensor, device: torch.device) -> None:
        """Copies `part`, which is `source` of the tensor, to its place; makes the parameter first.

        On a CPU a large part that is the whole parameter, of its dtype, is taken as it is: a view
        of the mapped file, which costs no memory of its own.
        """
        param = getattr(self.owner, self.attribute)
        if param.is_meta:
            if self._can_map(part, param, device):
                self._assign(part.view(param.shape))
                part.view(-1).view(torch.uint8)[::PAGE].max()  # off the disk now, not at first use
                return
            param = self._assign(torch.empty_like(param, device=device))
        target = param.data[self.rows]
        if self.columns != ALL:
            target = target[:, self.columns]
        # One number may fill many rows: the scale of a layer that is merged with others.
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
    """A parameter to be; its dtype and device are those of the model's construction."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class DenseWeight(nn.Module):
    """Rows [out, in] and bias [out] of a linear layer; packed, on a CPU, once they are loaded."""

    weight: Weight  # a parameter until it is packed

    def __init__(self, out_size: int, in_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = empty(out_size, in_size)
        self.bias = empty(out_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, in] -> [n, out]."""
        return linear(x, self.weight, self.bias)

    def loaders(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = ALL,
        source: tuple[slice, ...] = (ALL,),
    ) -> Iterator[WeightLoader]:
        """`name`.weight of `shape`, whose part `source` goes to `rows`; and its bias."""
        yield WeightLoader(f"{name}.weight", shape, self, "weight", rows, source)
        if self.bias is not None:
            yield WeightLoader(f"{name}.bias", shape[:1], self, "bias", rows, source[:1])

    def finish(self, quantization: str | None) -> None:
        """Gives the loaded rows the form that products read."""
        self.share(self._parameters["weight"], quantization)

    def share(self, rows: nn.Parameter | None, quantization: str | None) -> None:
        """Takes rows that are loaded, which another module may keep too."""
        assert rows is not None, "finished twice"
        packed = pack_weight(rows.data, quantization)
        self._parameters.pop("weight", None)
        self.weight = rows if isinstance(packed, torch.Tensor) else packed

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight where it is no parameter any more."""
        return 0 if "weight" in self._parameters else self.weight.nbytes
