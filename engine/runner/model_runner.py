"""A rank's step: copy blocks, drop embeddings, encode, overlay, decode, sample."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ...kernels import native
from ...kernels.kv_cache import copy_blocks
from ...kernels.paged_attention import AttentionBatch
from ...scheduler.errors import RequestError
from ...scheduler.request import UnitKey
from ..config.engine_config import ModelConfig, PreprocessConfig
from ..model.decoder import LayerCache
from ..model.parallel import TensorParallel
from ..model.qwen2_vl import Qwen2VL
from .batch import BatchResult, EncodeTask, InputBatch, Int32
from .decode_graph import DecodeGraphs, decode_graphs
from .encode_stage import EncodeStage
from .kv_cache import MemoryReport, allocate_kv_cache, device_memory, kv_block_bytes
from .loader import OnProgress, load_weights
from .logprobs import LogprobTensors, prompt_logprobs, token_logprobs
from .pending import SKIPPED, PendingResult
from .resident import make_resident
from .sampler import Sampler, SeenTokens
from .stage_clock import StageClock
from .tensors import to_device


@dataclass(eq=False)
class ModelRunner:
    """A rank's model, KV cache and embedding cache.

    Call `load`, then `allocate`, then `step` (or `launch`) for each step.
    """

    model_dir: Path
    config: ModelConfig
    preprocess: PreprocessConfig
    device: torch.device
    dtype: torch.dtype
    block_size: int
    parallel: TensorParallel
    quantization: str | None = None  # of weights and activations: None or "int8"
    kv_cache_dtype: torch.dtype | None = None  # None: `dtype`; or float8_e4m3fn
    embeddings: dict[UnitKey, torch.Tensor] = field(default_factory=dict)
    caches: list[LayerCache] = field(default_factory=list)
    graphs: DecodeGraphs | None = None  # CUDA only

    def __post_init__(self) -> None:
        """Build the model. Raises ConfigError if the ranks cannot share the checkpoint."""
        self.model = Qwen2VL(self.config, self.parallel, self.dtype)
        seen = SeenTokens(self.config.vocab_size, self.device)
        self._encoder = EncodeStage(
            self.model.visual, self.config, self.preprocess, self.parallel, self.device, self.dtype
        )
        self.sampler = Sampler(self.config.vision_token_ids, seen)
        # Tokens sampled by the latest step, int64 [s] on the device: input of the next step's rows.
        self._sampled = torch.empty(0, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def load(self, on_progress: OnProgress | None = None) -> None:
        """Load the weights. Raises ConfigError naming the invalid tensor or file."""
        native.has_tiles()  # forks a child, which is cheaper before weights are loaded
        load_weights(
            self.model, self.model_dir, self.config, self.device, on_progress, self.quantization
        )

    def measure(self) -> MemoryReport:
        """Return memory statistics; call it after `load`."""
        free, total = device_memory(self.device)
        return MemoryReport(
            weight_bytes=self.model.weight_bytes,
            total_bytes=total,
            free_bytes=free,
            kv_block_bytes=kv_block_bytes(
                self.config, self.parallel.size, self.block_size, self.kv_cache_dtype or self.dtype
            ),
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
        )

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache. On a CPU its memory becomes resident in the background."""
        self.caches = allocate_kv_cache(
            self.config,
            self.parallel.size,
            num_blocks,
            self.block_size,
            self.kv_cache_dtype or self.dtype,
            self.device,
        )
        if self.device.type == "cuda":
            longest = self.config.max_position_embeddings
            self.graphs = decode_graphs(self.model.decoder, self.caches, longest, self.device)
        caches = itertools.chain.from_iterable(self.caches)
        make_resident([cache for cache in caches if isinstance(cache, torch.Tensor)])

    def step(self, batch: InputBatch) -> BatchResult:
        """Run one step, and wait for its result."""
        return self.launch(batch).wait()

    @torch.inference_mode()
    def launch(self, batch: InputBatch) -> PendingResult:
        """Start one step; a GPU may still be computing on return.

        All ranks must be given the same step. A row with a missing embedding, or with token ids
        outside the vocabulary, is reported, and samples nothing (-1); its blocks are invalid. A row
        that awaits a token which was not sampled is skipped without a report. Other rows are not
        affected.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # per thread
        for key in batch.drop:
            self.embeddings.pop(key, None)
        self._copy_blocks(batch.copies)
        clock = self._encode(batch.encode) if batch.encode else None
        checked, errors = self._checked_token_ids(batch)
        if checked.size == 0:
            self._sampled = self._sampled.new_empty(0)
            return PendingResult.of(self._sampled, batch, (), errors, encode_clock=clock)
        token_ids, lost = self._resolve(self._to_device(checked), batch)
        logits, of_prompt, missing = self._compute(token_ids, batch, errors)
        sampled = self._sample(logits, batch, token_ids)
        of_drawn = self._logprobs(logits, sampled, batch)
        skipped = {row for row, _ in missing} | {row for row, _ in errors}
        rows = batch.sampling.rows
        if skipped:
            lost[list(skipped)] = True
        self._sampled = sampled.masked_fill_(lost[self._to_device(rows)], SKIPPED)
        return PendingResult.of(self._sampled, batch, missing, errors, of_drawn, of_prompt, clock)

    def _compute(
        self, token_ids: torch.Tensor, batch: InputBatch, errors: list[tuple[int, RequestError]]
    ) -> tuple[torch.Tensor | None, LogprobTensors | None, list[tuple[int, UnitKey]]]:
        """Return logits, prompt logprobs (both on rank 0 only), and missing embeddings."""
        bucket = self.graphs.bucket_of(batch) if self.graphs is not None else None
        if self.graphs is not None and bucket is not None:
            return self.graphs.logits(token_ids, batch, bucket), None, []
        hidden = self.model.decoder.embed_tokens(token_ids)
        missing = self._overlay(hidden, batch, errors)
        return *self._decode(hidden, batch), missing

    def _resolve(
        self, token_ids: torch.Tensor, batch: InputBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Insert tokens sampled by the previous step.

        Returns token ids [n], and which rows [r] lack theirs, because it was not sampled.
        """
        lost = torch.zeros(len(batch.awaits), dtype=torch.bool, device=self.device)
        rows = np.flatnonzero(batch.awaits >= 0)
        if not rows.size:
            return token_ids, lost
        sampled = self._sampled[self._to_device(batch.awaits[rows])]
        last = np.cumsum(batch.num_scheduled_tokens, dtype=np.int64) - 1
        token_ids = token_ids.clone()
        token_ids[self._to_device(last[rows])] = sampled.clamp(min=0).to(token_ids.dtype)
        lost[self._to_device(rows)] = sampled < 0
        return token_ids, lost

    def _copy_blocks(self, copies: Int32) -> None:
        if copies.size:
            pairs = self._to_device(copies.astype(np.int64))
            for cache in itertools.chain.from_iterable(self.caches):
                copy_blocks(cache, pairs)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)

    def _checked_token_ids(self, batch: InputBatch) -> tuple[Int32, list[tuple[int, RequestError]]]:
        """Return token ids with invalid ones set to 0, and errors of their rows."""
        ids = batch.token_ids
        wrong = (ids < 0) | (ids >= self.config.vocab_size)
        if not wrong.any():
            return ids, []
        row_of_token = np.repeat(np.arange(len(batch.context_lens)), batch.num_scheduled_tokens)
        text = f"a token id is outside the vocabulary of size {self.config.vocab_size}"
        rows = np.unique(row_of_token[wrong]).tolist()
        error = RequestError("INTERNAL", text)
        return np.where(wrong, 0, ids).astype(np.int32), [(row, error) for row in rows]

    def _encode(self, tasks: tuple[EncodeTask, ...]) -> StageClock:
        clock = StageClock(self.device)
        clock.mark()
        self.embeddings |= self._encoder.run(tasks)
        clock.mark()
        return clock

    def _overlay(
        self, hidden: torch.Tensor, batch: InputBatch, errors: list[tuple[int, RequestError]]
    ) -> list[tuple[int, UnitKey]]:
        """Write embeddings over placeholder rows in place; return missing ones as (row, key)."""
        missing = []
        for piece in batch.embeddings:
            embedding = self.embeddings.get(piece.key)
            if embedding is None:
                missing.append((piece.row, piece.key))
                continue
            part = embedding[piece.start : piece.start + piece.num_tokens]
            if len(part) == piece.num_tokens:
                hidden[piece.dest : piece.dest + piece.num_tokens] = part
            else:
                text = (
                    f"{piece.num_tokens} placeholders from embedding {piece.start} on exceed "
                    f"the unit's {len(embedding)} embeddings"
                )
                errors.append((piece.row, RequestError("INTERNAL", text)))
        return missing

    def _decode(
        self, hidden: torch.Tensor, batch: InputBatch
    ) -> tuple[torch.Tensor | None, LogprobTensors | None]:
        attention = AttentionBatch.from_lists(
            batch.num_scheduled_tokens,
            batch.context_lens,
            batch.block_tables,
            self.block_size,
            self.device,
        )
        last = np.cumsum(batch.num_scheduled_tokens, dtype=np.int64) - 1
        sample_at = self._to_device(last[batch.sampling.rows])
        positions = self._to_device(batch.positions)
        decoder, targets = self.model.decoder, batch.sampling.prompt_targets
        made = decoder.run(hidden, positions, self.caches, attention)
        of_prompt = None
        if targets is not None:
            of_prompt = prompt_logprobs(lambda at: decoder.logits(*made, at), targets, self.device)
        return decoder.logits(*made, sample_at), of_prompt

    def _sample(
        self, logits: torch.Tensor | None, batch: InputBatch, token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Sample on rank 0, and broadcast the tokens, so that ranks cannot diverge."""
        rows = batch.sampling.rows
        sampled = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        if rows.size == 0:
            return sampled
        if logits is not None:
            last = np.cumsum(batch.num_scheduled_tokens, dtype=np.int64) - 1
            last_token_ids = token_ids[self._to_device(last[rows])].long()
            sampled = self.sampler.sample(logits, batch.sampling, last_token_ids)
        return self.parallel.broadcast(sampled, 0)

    def _logprobs(
        self, logits: torch.Tensor | None, sampled: torch.Tensor, batch: InputBatch
    ) -> LogprobTensors | None:
        places = batch.sampling.logprob_places
        if logits is None or places is None:
            return None
        chosen = self._to_device(places.astype(np.int64))
        return token_logprobs(logits[chosen], sampled[chosen], places)
