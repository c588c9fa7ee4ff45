"""Linear layers and embeddings, each of which holds this rank's part of a checkpoint's tensors.

A layer is built without memory (on torch's `meta` device) and names, through `weight_loaders`, the
checkpoint tensors that it wants and which part of each goes where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ...kernels.linear import linear
from ...kernels.norm import add_rms_norm, rms_norm
from ..config import ModelConfig
from .parallel import TensorParallel, kv_heads_of_rank

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

    def load(self, part: torch.Tensor, device: torch.device) -> None:
        """Copies `part`, which is `source` of the tensor, to its rows; makes the parameter first.

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
        target.copy_(part.reshape(target.shape))

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


class RMSNorm(nn.Module):
    """Root-mean-square norm; with `residual`, the sum is normalised and returned beside it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, residual, self.weight, self.eps)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield WeightLoader(f"{name}.weight", tuple(self.weight.shape), self, "weight")


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = empty(size)
        self.bias = empty(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        for attribute in ("weight", "bias"):
            yield WeightLoader(f"{name}.{attribute}", tuple(self.weight.shape), self, attribute)


class Linear(nn.Module):
    """A whole linear layer on every rank; `kernel_shape` where the checkpoint has a convolution."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool = True,
        kernel_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.weight = empty(out_size, in_size)
        self.bias = empty(out_size) if bias else None
        self.shape = (out_size, *(kernel_shape or (in_size,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield WeightLoader(f"{name}.weight", self.shape, self, "weight")
        if self.bias is not None:
            yield WeightLoader(f"{name}.bias", self.shape[:1], self, "bias")


@dataclass(frozen=True)
class ColumnPart:
    """A checkpoint tensor of a merged layer: its rows that this rank holds, in order."""

    name: str
    total: int  # rows in the checkpoint
    rows: tuple[slice, ...]

    @property
    def size(self) -> int:
        return sum(rows.stop - rows.start for rows in self.rows)


class ColumnParallelLinear(nn.Module):
    """Output columns dealt out over the ranks; the rows of its parts lie one after another."""

    def __init__(self, in_size: int, parts: tuple[ColumnPart, ...], bias: bool) -> None:
        super().__init__()
        self.in_size, self.parts = in_size, parts
        out_size = sum(part.size for part in parts)
        self.weight = empty(out_size, in_size)
        self.bias = empty(out_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        """`name` is the parent's: q_proj, k_proj, ... are its children."""
        start = 0
        for part in self.parts:
            for rows in part.rows:
                dest = slice(start, start + rows.stop - rows.start)
                start = dest.stop
                shape, source = (part.total, self.in_size), (rows,)
                yield WeightLoader(
                    f"{name}.{part.name}.weight", shape, self, "weight", dest, source
                )
                if self.bias is not None:
                    child = f"{name}.{part.name}.bias"
                    yield WeightLoader(child, shape[:1], self, "bias", dest, source)


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value in one product: [n, (heads + 2 × KV heads of this rank) × head_dim]."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        head_dim, heads = config.head_dim, config.num_attention_heads
        kv_heads = kv_heads_of_rank(config, parallel)
        kv_rows = tuple(slice(head * head_dim, (head + 1) * head_dim) for head in kv_heads)
        q_rows = (parallel.shard(heads * head_dim),)
        kv_total = config.num_key_value_heads * head_dim
        parts = (
            ColumnPart("q_proj", heads * head_dim, q_rows),
            ColumnPart("k_proj", kv_total, kv_rows),
            ColumnPart("v_proj", kv_total, kv_rows),
        )
        super().__init__(config.hidden_size, parts, bias=True)
        self.head_dim = head_dim
        self.sizes = (parts[0].size, parts[1].size, parts[2].size)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [n, heads of each, head_dim], as views of the product."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in x.split(self.sizes, dim=-1))
        return q, k, v


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Layers of the same input and output size in one product, such as gate and up."""

    def __init__(
        self, in_size: int, out_size: int, names: tuple[str, ...], parallel: TensorParallel
    ) -> None:
        rows = parallel.shard(out_size)
        parts = tuple(ColumnPart(name, out_size, (rows,)) for name in names)
        super().__init__(in_size, parts, bias=False)


class RowParallelLinear(nn.Module):
    """Input columns dealt out over the ranks; the products are summed over them."""

    def __init__(self, in_size: int, out_size: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.shape = (out_size, in_size)
        self.columns = parallel.shard(in_size)
        self.weight = empty(out_size, self.columns.stop - self.columns.start)
        self.parallel = parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parallel.all_reduce(linear(x, self.weight))

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        source = (ALL, self.columns)
        yield WeightLoader(f"{name}.weight", self.shape, self, "weight", ALL, source)


class VocabParallelEmbedding(nn.Module):
    """Rows of the vocabulary dealt out over the ranks, the last ones padded to the same count.

    Serves as the head too: `logits` is the product with the same rows.
    """

    def __init__(self, vocab_size: int, hidden_size: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.vocab_size, self.parallel = vocab_size, parallel
        size = -(-vocab_size // parallel.size)
        self.start = min(parallel.rank * size, vocab_size)
        self.stop = min(self.start + size, vocab_size)
        self.weight = empty(size, hidden_size)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, hidden] of token ids [n], every one in [0, vocab_size)."""
        if self.parallel.size == 1:
            return nn.functional.embedding(token_ids, self.weight)
        mine = (token_ids >= self.start) & (token_ids < self.stop)
        rows = nn.functional.embedding((token_ids - self.start) * mine, self.weight)
        return self.parallel.all_reduce(rows.masked_fill_(~mine[:, None], 0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits [rows, vocab_size] of hidden states [rows, hidden] on rank 0, None elsewhere."""
        joined = self.parallel.gather(linear(hidden, self.weight))
        return None if joined is None else joined[:, : self.vocab_size]

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        shape = (self.vocab_size, self.weight.shape[1])
        mine = slice(self.start, self.stop)
        rows = slice(0, self.stop - self.start)
        yield WeightLoader(f"{name}.weight", shape, self, "weight", rows, (mine,))
