"""Decode steps in CUDA graphs: one launch per step instead of hundreds.

A graph replays the captured grids on the same memory. So a step in which every row computes one
token is padded to a bucket of rows and blocks, its input is copied to static tensors, and the
kernels read lengths and block tables from these. Padding rows have slot -1, which writes nothing,
and one key; their results are ignored. Rows are independent, and a row's splits depend on its own
length only, so the bucket does not change results.

The step on static tensors (`StaticDecode`) is tested in Triton's interpreter. The capture has not
been run on hardware yet; if it fails, steps run without graphs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.paged_attention import AttentionBatch
from ..model.decoder import Decoder, LayerCache
from .batch import InputBatch

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SHORT_TOKENS = 4096  # rows up to this length use a grid with fewer splits

Logits = torch.Tensor | None  # [rows of the bucket, vocab_size]; None except on rank 0
Compute = Callable[[], Logits]


@dataclass(frozen=True)
class Bucket:
    """Fixed sizes of a captured step."""

    rows: int
    blocks: int  # blocks per row


def buckets(batch: InputBatch, widths: tuple[int, ...]) -> Bucket | None:
    """Return the smallest bucket for a step.

    Returns None if the step has prefill, embeddings or prompt logprobs, or is too large.
    `widths`: available blocks per table, ascending.
    """
    rows, width = batch.block_tables.shape
    if batch.embeddings or rows == 0 or rows > ROWS[-1] or width > widths[-1]:
        return None
    if (batch.num_scheduled_tokens != 1).any() or batch.sampling.prompt_targets is not None:
        return None
    return Bucket(ROWS[bisect_left(ROWS, rows)], widths[bisect_left(widths, width)])


class StaticDecode:
    """A decode step whose input is in static tensors."""

    def __init__(
        self, decoder: Decoder, caches: list[LayerCache], max_tokens: int, device: torch.device
    ) -> None:
        """Allocate the tensors; `max_tokens` is the maximum length of a row."""
        self.decoder, self.caches = decoder, caches
        self.block_size = caches[0][0].shape[2]
        short, long = (-(-tokens // self.block_size) for tokens in (SHORT_TOKENS, max_tokens))
        self.widths = (short, long) if short < long else (long,)
        rows = ROWS[-1]
        self.token_ids = torch.zeros(rows, dtype=torch.int32, device=device)
        self.positions = torch.zeros((3, rows), dtype=torch.int32, device=device)
        self.context_lens = torch.ones(rows, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros((rows, long), dtype=torch.int32, device=device)
        self.slot_mapping = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.rows = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.sample_at = torch.arange(rows, device=device)

    def fill(self, token_ids: torch.Tensor, batch: InputBatch, bucket: Bucket) -> None:
        """Copy a step's input to the static tensors.

        Of padding rows, only lengths and slots are reset; other stale values have no effect.
        """
        count, width = batch.block_tables.shape
        last = batch.context_lens - 1
        blocks = batch.block_tables[np.arange(count), last // self.block_size].astype(np.int64)
        slots = np.full(bucket.rows, -1, np.int64)
        slots[:count] = blocks * self.block_size + last % self.block_size
        lengths = np.ones(bucket.rows, np.int32)
        lengths[:count] = batch.context_lens
        self.token_ids[:count].copy_(token_ids)
        self._put(self.positions[:, :count], batch.positions)
        self._put(self.block_tables[:count, :width], batch.block_tables)
        self._put(self.context_lens[: bucket.rows], lengths)
        self._put(self.slot_mapping[: bucket.rows], slots)

    def _put(self, target: torch.Tensor, values: np.ndarray) -> None:
        # Arrays that view a message's bytes are read-only, which torch does not support.
        target.copy_(torch.from_numpy(np.require(values, requirements=("C", "W"))))

    def compute(self, bucket: Bucket) -> Logits:
        """Run the step on the current content of the tensors; return its logits."""
        rows = bucket.rows
        batch = AttentionBatch(
            num_scheduled_tokens=(1,) * rows,
            host_context_lens=(),  # a replay does not see host values
            cu_seqlens_q=self.rows[: rows + 1],
            context_lens=self.context_lens[:rows],
            block_tables=self.block_tables[:rows, : bucket.blocks],
            slot_mapping=self.slot_mapping[:rows],
            decode_rows=self.rows[:rows],
            chunk_rows=(),
        )
        hidden = self.decoder.embed_tokens(self.token_ids[:rows])
        positions, sample_at = self.positions[:, :rows], self.sample_at[:rows]
        return self.decoder(hidden, positions, self.caches, batch, sample_at)


class Capture:
    """Captures CUDA graphs. All share one memory pool, since no two run at once."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Capture `compute`; return its replay, which returns the same tensor each time."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may wait for results of earlier steps during the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits = compute()

        def replay() -> Logits:
            graph.replay()
            return logits

        return replay


class DecodeGraphs:
    """Runs decode steps, captured lazily.

    A bucket's first step runs directly, which compiles its kernels. The second one is captured, and
    replayed from then on.
    """

    def __init__(self, static: StaticDecode, capture: Callable[[Compute], Compute]) -> None:
        self.static, self.capture = static, capture
        self.replays: dict[Bucket, Compute | None] = {}
        self.failed = False

    def bucket_of(self, batch: InputBatch) -> Bucket | None:
        """Return the bucket of a step; None if it cannot run in a graph."""
        return None if self.failed else buckets(batch, self.static.widths)

    def logits(self, token_ids: torch.Tensor, batch: InputBatch, bucket: Bucket) -> Logits:
        """Return the logits [s, vocab_size] of the rows that sample; None except on rank 0.

        token_ids: int32 [r]. The result is overwritten by the next step.
        """
        self.static.fill(token_ids, batch, bucket)
        rows = torch.from_numpy(batch.sampling.rows.astype(np.int64)).to(token_ids.device)
        made = self._replay(bucket)()
        return None if made is None or not len(rows) else made[rows]

    def _replay(self, bucket: Bucket) -> Compute:
        def compute() -> Logits:
            return self.static.compute(bucket)

        if bucket not in self.replays:
            self.replays[bucket] = None
            return compute
        replay = self.replays[bucket]
        if replay is None:
            try:
                replay = self.replays[bucket] = self.capture(compute)
            except RuntimeError as error:
                log.warning("decode steps run without CUDA graphs: %s", error)
                self.failed = True
                return compute
        return replay


def decode_graphs(
    decoder: Decoder, caches: list[LayerCache], max_tokens: int, device: torch.device
) -> DecodeGraphs:
    """Return graphs for a decoder on a CUDA device; see `StaticDecode` for arguments."""
    # A captured step cannot copy from the host.
    decoder.inv_freq = decoder.inv_freq.to(device)
    return DecodeGraphs(StaticDecode(decoder, caches, max_tokens, device), Capture())
