"""Attention metadata of a step: where its tokens lie in the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ArrayLike = Any  # lists or numpy arrays of integers


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Attention metadata of a step, shared by all layers. Tensors are on the device.

    Row i has query tokens [cu_seqlens_q[i], cu_seqlens_q[i + 1]). They are the last of the
    context_lens[i] tokens that its blocks hold after this step's keys and values are written.
    """

    num_scheduled_tokens: tuple[int, ...]  # [r] on the host
    host_context_lens: tuple[int, ...]  # [r]
    cu_seqlens_q: torch.Tensor  # int32 [r + 1]
    context_lens: torch.Tensor  # int32 [r]
    block_tables: torch.Tensor  # int32 [r, blocks]
    slot_mapping: torch.Tensor  # int64 [n]
    decode_rows: torch.Tensor  # int32 [decode rows]: rows that compute one token
    chunk_rows: tuple[int, ...]  # the other rows, on the host

    @classmethod
    def from_lists(
        cls,
        num_scheduled_tokens: ArrayLike,
        context_lens: ArrayLike,
        block_tables: ArrayLike,
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """Build a batch from lists or arrays.

        Args:
            num_scheduled_tokens: [r] query tokens per row.
            context_lens: [r] tokens per row, including this step's.
            block_tables: [r, blocks] block ids, padded with any valid id.
        """
        counts = torch.tensor(num_scheduled_tokens, dtype=torch.int64)
        lens = torch.tensor(context_lens, dtype=torch.int64)
        tables = torch.tensor(block_tables, dtype=torch.int32).reshape(len(counts), -1)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(int(bounds[-1])) - bounds[rows] + (lens - counts)[rows]
        blocks = tables[rows, places // block_size].long()
        decode = (counts == 1).nonzero().flatten()
        return cls(
            num_scheduled_tokens=tuple(counts.tolist()),
            host_context_lens=tuple(lens.tolist()),
            cu_seqlens_q=bounds.int().to(device),
            context_lens=lens.int().to(device),
            block_tables=tables.to(device),
            slot_mapping=(blocks * block_size + places % block_size).to(device),
            decode_rows=decode.int().to(device),
            chunk_rows=tuple((counts != 1).nonzero().flatten().tolist()),
        )
