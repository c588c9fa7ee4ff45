"""Drive a ModelRunner directly: requests with random media, block tables and chunked steps.

A minimal replacement of the scheduler and batch builder, for tests and microbenchmarks of the
runner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ...engine.config.engine_config import ModelConfig
from ...engine.runner.batch import (
    BatchResult,
    EmbeddingSlice,
    EncodeTask,
    InputBatch,
    SamplingBatch,
)
from ...engine.runner.model_runner import ModelRunner
from ...scheduler.params import SamplingParams
from ...scheduler.request import EncodeUnit, MediaSpan
from .tiny_checkpoint import SPECIAL_IDS

GREEDY = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0
)


@dataclass(frozen=True)
class TinyMedia:
    """Pixels uint8 [frames, height, width, 3] of an image (one frame) or a video."""

    pixels: npt.NDArray[np.uint8]
    is_video: bool

    @classmethod
    def random(cls, seed: int, height: int, width: int, frames: int = 0) -> TinyMedia:
        """Return a random image, or a video if `frames` > 0, of `height` × `width` pixels."""
        shape = (frames or 1, height, width, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        return cls(pixels, is_video=frames > 0)

    def grid_thw(self, config: ModelConfig) -> tuple[int, int, int]:
        vision = config.vision
        frames, height, width, _ = self.pixels.shape
        patch = vision.patch_size
        return -(-frames // vision.temporal_patch_size), height // patch, width // patch


Part = Sequence[int] | TinyMedia  # token ids, or media that becomes placeholder tokens
START, END = SPECIAL_IDS["<|vision_start|>"], SPECIAL_IDS["<|vision_end|>"]


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def image(seed: int, height: int, width: int) -> list[list[int] | TinyMedia]:
    return [[START], TinyMedia.random(seed, height, width), [END]]


def video(seed: int, frames: int, height: int, width: int) -> list[list[int] | TinyMedia]:
    return [[START], TinyMedia.random(seed, height, width, frames), [END]]


@dataclass(eq=False)
class TinyRequest:
    """A prompt and the state of its generation."""

    token_ids: list[int]
    positions: npt.NDArray[np.int32]  # [3, prompt]
    units: tuple[EncodeUnit, ...]
    media: dict[bytes, TinyMedia]
    grids: dict[bytes, tuple[int, int, int]]
    params: SamplingParams = GREEDY
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.delta = int(self.positions.max()) + 1 - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def positions_of(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Return M-RoPE positions [3, stop - start] of tokens [start, stop), output included."""
        after = np.arange(self.num_prompt_tokens, max(stop, self.num_prompt_tokens)) + self.delta
        whole = np.concatenate([self.positions, np.tile(after, (3, 1)).astype(np.int32)], axis=1)
        return whole[:, start:stop]


def tiny_request(
    config: ModelConfig,
    parts: Iterable[Part],
    params: SamplingParams = GREEDY,
    max_unit_temporal_patches: int = 4,
) -> TinyRequest:
    """Build a request of text (token ids) and media in the given order."""
    token_ids: list[int] = []
    positions: list[npt.NDArray[np.int32]] = []
    units: list[EncodeUnit] = []
    media: dict[bytes, TinyMedia] = {}
    grids: dict[bytes, tuple[int, int, int]] = {}
    position = 0
    for part in parts:
        if not isinstance(part, TinyMedia):
            axis = np.arange(position, position + len(part), dtype=np.int32)
            positions.append(np.tile(axis, (3, 1)))
            token_ids += part
            position += len(part)
            continue
        grid, merge = part.grid_thw(config), config.vision.spatial_merge_size
        shape = (grid[0], grid[1] // merge, grid[2] // merge)
        placeholder = config.video_token_id if part.is_video else config.image_token_id
        media_hash = hashlib.sha256(part.pixels.tobytes() + bytes(shape)).digest()
        span = MediaSpan(len(token_ids), int(np.prod(shape)), grid)
        media[media_hash], grids[media_hash] = part, grid
        units += [
            replace(unit, media_hash=media_hash) for unit in span.units(max_unit_temporal_patches)
        ]
        positions.append(np.indices(shape, np.int32).reshape(3, -1) + np.int32(position))
        token_ids += [placeholder] * span.num_tokens
        position += max(shape)
    joined = np.concatenate(positions, axis=1)
    return TinyRequest(token_ids, joined, tuple(units), media, grids, params)


@dataclass(eq=False)
class TinyDriver:
    """Runs steps on a runner with an allocated cache; requests share no blocks."""

    runner: ModelRunner
    num_blocks: int
    max_unit_temporal_patches: int = 4
    free_blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_blocks = list(range(self.num_blocks))

    def generate(
        self, requests: Sequence[TinyRequest], max_tokens: int, chunk: int | None = None
    ) -> list[list[int]]:
        """Generate all requests in one batch with at most `chunk` tokens of each per step.

        Returns the output token ids of each request.
        """
        while True:
            rows = [r for r in requests if len(r.output_token_ids) < max_tokens and not r.errors]
            if not rows:
                return [request.output_token_ids for request in requests]
            counts = [
                min(chunk or len(r.token_ids), len(r.token_ids) - r.num_computed_tokens)
                for r in rows
            ]
            self.step(rows, counts)

    def step(self, rows: Sequence[TinyRequest], counts: Sequence[int]) -> BatchResult:
        """Compute `counts` more tokens of each row and append the sampled tokens."""
        batch = self.build(rows, counts)
        result = self.runner.step(batch)
        for index, error in result.errors:
            rows[index].errors.append(error.message)
        for row, count in zip(rows, counts, strict=True):
            row.num_computed_tokens += count
        sampled = result.sampled.tolist()
        for index, token in zip(batch.sampling.rows.tolist(), sampled, strict=True):
            if token >= 0:
                rows[index].token_ids.append(token)
        return result

    def build(self, rows: Sequence[TinyRequest], counts: Sequence[int]) -> InputBatch:
        for row, count in zip(rows, counts, strict=True):
            needed = -(-(row.num_computed_tokens + count) // self.runner.block_size)
            while len(row.block_table) < needed:
                row.block_table.append(self.free_blocks.pop())
        spans = [
            (r.num_computed_tokens, r.num_computed_tokens + c)
            for r, c in zip(rows, counts, strict=True)
        ]
        placed = list(zip(rows, spans, strict=True))
        width = max(len(row.block_table) for row in rows)
        tables = [row.block_table + [0] * (width - len(row.block_table)) for row in rows]
        ids = [token for row, (a, b) in placed for token in row.token_ids[a:b]]
        positions = [row.positions_of(a, b) for row, (a, b) in placed]
        samples = [(i, r) for i, (r, (_, stop)) in enumerate(placed) if stop == len(r.token_ids)]
        encode, embeddings = self._media(rows, spans)
        return InputBatch(
            token_ids=np.array(ids, np.int32),
            positions=np.ascontiguousarray(np.concatenate(positions, axis=1)),
            num_scheduled_tokens=np.array(counts, np.int32),
            context_lens=np.array([stop for _, stop in spans], np.int32),
            block_tables=np.array(tables, np.int32),
            sampling=_sampling(samples),
            awaits=np.full(len(rows), -1, np.int32),
            encode=encode,
            embeddings=embeddings,
        )

    def _media(
        self, rows: Sequence[TinyRequest], spans: Sequence[tuple[int, int]]
    ) -> tuple[tuple[EncodeTask, ...], tuple[EmbeddingSlice, ...]]:
        tasks: dict[tuple[bytes, int], EncodeTask] = {}
        slices: list[EmbeddingSlice] = []
        first = 0
        for index, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
            for unit in row.units:
                low, high = max(start, unit.offset), min(stop, unit.end)
                if low >= high:
                    continue
                if unit.key not in self.runner.embeddings:
                    tasks.setdefault(unit.key, self._task(row, unit, len(tasks)))
                dest = first + low - start
                slices.append(EmbeddingSlice(unit.key, low - unit.offset, high - low, dest, index))
            first += stop - start
        return tuple(tasks.values()), tuple(slices)

    def _task(self, row: TinyRequest, unit: EncodeUnit, turn: int) -> EncodeTask:
        media, grid = row.media[unit.media_hash], row.grids[unit.media_hash]
        frames = unit.num_patches // (grid[1] * grid[2])
        both = self.runner.config.vision.temporal_patch_size
        start = unit.index * self.max_unit_temporal_patches * both
        pixels = media.pixels[start : start + frames * both]
        rank = turn % self.runner.parallel.size
        mine = rank == self.runner.parallel.rank
        return EncodeTask(unit.key, (frames, *grid[1:]), rank, pixels if mine else None)


def _sampling(rows: list[tuple[int, TinyRequest]]) -> SamplingBatch:
    params = [request.params for _, request in rows]
    penalized = np.array([p.repetition_penalty != 1 for p in params], bool)
    return SamplingBatch(
        rows=np.array([row for row, _ in rows], np.int32),
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        repetition_penalty=np.array([p.repetition_penalty for p in params], np.float32),
        seed=np.array([p.seed for p in params], np.uint64),
        output_index=np.array([len(r.output_token_ids) for _, r in rows], np.int32),
        slots=np.where(penalized, np.arange(len(params)), -1).astype(np.int32),
        seen_token_ids=tuple(np.array(request.token_ids, np.int32) for _, request in rows),
    )
