"""Norms, linear layers and embeddings, sharded over the tensor-parallel ranks.

Each layer lists the parts of checkpoint tensors that this rank needs (`weight_loaders`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ...kernels.norm import add_rms_norm, rms_norm
from ..config.engine_config import ModelConfig
from ..config.quantization import WeightFormat
from .parallel import TensorParallel, kv_heads_of_rank
from .quantized import make_weight
from .weights import ALL, DenseWeight, WeightLoader, empty


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of x [n, size]."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of x + residual, x + residual), both [n, size]."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield WeightLoader(f"{name}.weight", tuple(self.weight.shape), self, "weight")


class LayerNorm(nn.Module):
    """Layer norm with weight and bias over the last dimension, [..., size] to [..., size]."""

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
    """Linear layer that is replicated on every rank: [n, in_size] to [n, out_size].

    kernel_shape: shape of the checkpoint's convolution kernel, without the output dimension, if
    the layer is stored as a convolution.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool = True,
        kernel_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.weight = DenseWeight(out_size, in_size, bias)
        self.shape = (out_size, *(kernel_shape or (in_size,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, out_size] of x [n, in_size]."""
        return self.weight(x)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.weight.loaders(name, self.shape)


@dataclass(frozen=True)
class ColumnPart:
    """A checkpoint tensor of a merged layer, and the rows that this rank holds, in order."""

    name: str
    total: int  # rows in the checkpoint
    rows: tuple[slice, ...]

    @property
    def size(self) -> int:
        return sum(rows.stop - rows.start for rows in self.rows)


class ColumnParallelLinear(nn.Module):
    """Linear layer whose outputs are sharded over the ranks.

    Maps [n, in_size] to [n, outputs of this rank]; the outputs of `parts` are concatenated.
    """

    def __init__(
        self, in_size: int, parts: tuple[ColumnPart, ...], bias: bool, stored: WeightFormat | None
    ) -> None:
        super().__init__()
        self.in_size, self.parts = in_size, parts
        self.weight = make_weight(stored, sum(part.size for part in parts), in_size, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's outputs of x [n, in_size]."""
        return self.weight(x)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        """Yield the loaders; `name` is the parent module of q_proj, k_proj, etc."""
        start = 0
        for part in self.parts:
            for rows in part.rows:
                dest = slice(start, start + rows.stop - rows.start)
                start = dest.stop
                shape = (part.total, self.in_size)
                yield from self.weight.loaders(f"{name}.{part.name}", shape, dest, (rows,))


class QKVParallelLinear(ColumnParallelLinear):
    """Merged QKV projection: [n, hidden] to [n, (heads + 2 × KV heads of rank) × head_dim]."""

    def __init__(
        self, config: ModelConfig, parallel: TensorParallel, stored: WeightFormat | None
    ) -> None:
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
        super().__init__(config.hidden_size, parts, bias=True, stored=stored)
        self.head_dim = head_dim
        self.sizes = (parts[0].size, parts[1].size, parts[2].size)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v [n, heads of each, head_dim] as views of the output `x`."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in x.split(self.sizes, dim=-1))
        return q, k, v


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Merged layers of equal input and output size, such as gate and up."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        names: tuple[str, ...],
        parallel: TensorParallel,
        stored: WeightFormat | None,
    ) -> None:
        rows = parallel.shard(out_size)
        parts = tuple(ColumnPart(name, out_size, (rows,)) for name in names)
        super().__init__(in_size, parts, bias=False, stored=stored)


class RowParallelLinear(nn.Module):
    """Linear layer whose inputs are sharded over the ranks, with all-reduced outputs.

    Maps [n, inputs of this rank] to [n, out_size].
    """

    def __init__(
        self, in_size: int, out_size: int, parallel: TensorParallel, stored: WeightFormat | None
    ) -> None:
        super().__init__()
        self.shape = (out_size, in_size)
        self.columns = parallel.shard(in_size)
        self.weight = make_weight(stored, out_size, self.columns.stop - self.columns.start)
        self.parallel = parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the all-reduced output [n, out_size] of this rank's inputs `x`."""
        return self.reduce(self.weight(x))

    def reduce(self, products: torch.Tensor) -> torch.Tensor:
        """Sum `products` [n, out] over the ranks in place, and return them."""
        return self.parallel.all_reduce(products)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.weight.loaders(name, self.shape, ALL, (ALL, self.columns))


class VocabParallelEmbedding(nn.Module):
    """Embedding whose rows are sharded over the ranks.

    All ranks hold the same number of rows; the last ones are padded.
    """

    def __init__(self, vocab_size: int, hidden_size: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.vocab_size, self.parallel = vocab_size, parallel
        size = -(-vocab_size // parallel.size)
        self.start = min(parallel.rank * size, vocab_size)
        self.stop = min(self.start + size, vocab_size)
        self.weight = empty(size, hidden_size)
        self.tied: DenseWeight | None = None  # LM head that shares the rows

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings [n, hidden] of token ids [n], all in [0, vocab_size)."""
        if self.parallel.size == 1:
            return nn.functional.embedding(token_ids, self.weight)
        mine = (token_ids >= self.start) & (token_ids < self.stop)
        rows = nn.functional.embedding((token_ids - self.start) * mine, self.weight)
        return self.parallel.all_reduce(rows.masked_fill_(~mine[:, None], 0))

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        shape = (self.vocab_size, self.weight.shape[1])
        mine = slice(self.start, self.stop)
        rows = slice(0, self.stop - self.start)
        yield WeightLoader(f"{name}.weight", shape, self, "weight", rows, (mine,))

    def finish(self, quantization: str | None) -> None:
        """Pack the rows for a tied LM head after loading."""
        if self.tied is not None:
            self.tied.share(self.weight, quantization)


class ParallelHead(nn.Module):
    """LM head, sharded over the vocabulary; shares the rows of `embedding` if `tied`."""

    def __init__(self, embedding: VocabParallelEmbedding, tied: bool) -> None:
        super().__init__()
        self.vocab_size, self.parallel = embedding.vocab_size, embedding.parallel
        self.mine = slice(embedding.start, embedding.stop)
        size, self.hidden_size = embedding.weight.shape
        self.weight = DenseWeight(size, self.hidden_size)
        self.tied = tied
        if tied:
            self.weight.weight = embedding.weight  # shared parameter; replaced by `share`
            embedding.tied = self.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return the logits [n, vocab_size] of hidden states [n, hidden].

        Returns None on ranks other than 0.
        """
        joined = self.parallel.gather(self.weight(hidden))
        return None if joined is None else joined[:, : self.vocab_size]

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        if not self.tied:
            shape = (self.vocab_size, self.hidden_size)
            rows = slice(0, self.mine.stop - self.mine.start)
            yield from self.weight.loaders(name, shape, rows, (self.mine,))
