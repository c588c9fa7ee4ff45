"""Work of each kernel's launches: bytes to and from memory, operations, programs.

Bytes are a lower bound: data read by several programs counts once. A multiply and an add are two
operations. Numbers are bfloat16 unless the kernel stores wider ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from octavo.kernels.activation import SETTINGS as SWIGLU
from octavo.kernels.paged_decode import MAX_SPLITS, SPLIT_SIZE, num_splits
from octavo.kernels.tiles import chunk_splits, count_tiles

from .resources import BLOCK_SIZE, HEAD_DIM, VISION_HEAD_DIM, VISION_HEADS, Shape

TOKENS = (64, 512, 2048, 8192)  # tokens per step, for the token-wise kernels
CHUNKS = (512, 2048, 8192)
CONTEXTS = (32_768, 131_072)
DECODES = [(rows, context) for context in (4096, *CONTEXTS) for rows in (1, 16, 64)]
IMAGES = (448, 896, 1792)  # pixels per side


@dataclass(frozen=True)
class Work:
    case: str
    bytes: int
    operations: int
    grid: int  # programs

    def times(self, rows: int) -> Work:
        """Return the work of this many rows."""
        return Work(
            f"{rows} × {self.case}", rows * self.bytes, rows * self.operations, rows * self.grid
        )


def chunk_work(shape: Shape, tokens: int, context: int, block_m: int) -> Work:
    """Return the work of the last `tokens` of `context` under causal attention."""
    pairs = tokens * (context - tokens) + tokens * (tokens + 1) // 2
    group = shape.heads // shape.kv_heads
    splits = chunk_splits(tokens, context, group, shape.kv_heads)
    keys = 2 * context * shape.kv_heads * HEAD_DIM
    rows = tokens * shape.heads  # one per token and query head
    written = rows * (4 * splits * (HEAD_DIM + 1) if splits > 1 else 2 * HEAD_DIM)
    table = 4 * -(-context // BLOCK_SIZE)
    return Work(
        f"{tokens} of {context}",
        2 * rows * HEAD_DIM + 2 * keys + written + table,
        4 * HEAD_DIM * shape.heads * pairs,
        count_tiles((tokens,), block_m // group) * splits * shape.kv_heads,
    )


def join_chunks_work(shape: Shape, tokens: int, context: int, block_m: int) -> Work:
    """Return the work of joining the parts of a chunk whose keys are split."""
    group = shape.heads // shape.kv_heads
    splits = chunk_splits(tokens, context, group, shape.kv_heads)
    rows = tokens * shape.heads
    moved = rows * (4 * splits * (HEAD_DIM + 1) + 2 * HEAD_DIM)
    grid = count_tiles((tokens,), block_m // group) * shape.kv_heads
    return Work(f"{tokens} of {context}", moved, 2 * rows * splits * HEAD_DIM, grid)


def decode_work(shape: Shape, rows: int, context: int, fp8: bool = False) -> Work:
    """Return the work of a decode step, whose splits write float32 sums and results for the join.

    `fp8`: keys and values take a byte per number and a float32 scale each.
    """
    splits = used_splits(context)
    keys = 2 * rows * context * shape.kv_heads
    numbers = rows * shape.heads * HEAD_DIM * 2 + keys * (HEAD_DIM + 4 if fp8 else 2 * HEAD_DIM)
    table = 4 * rows * -(-context // BLOCK_SIZE)
    partial = 4 * rows * shape.heads * splits * (HEAD_DIM + 1)
    grid = rows * shape.kv_heads * num_splits(-(-context // BLOCK_SIZE), BLOCK_SIZE)
    operations = 4 * HEAD_DIM * shape.heads * context * rows
    return Work(f"{rows} × {context}", numbers + table + partial, operations, grid)


def join_work(shape: Shape, rows: int, context: int) -> Work:
    splits = used_splits(context)
    read = 4 * rows * shape.heads * splits * (HEAD_DIM + 1)
    written = 2 * rows * shape.heads * HEAD_DIM
    operations = 2 * rows * shape.heads * splits * HEAD_DIM
    return Work(f"{rows} × {context}", read + written, operations, rows * shape.heads)


def used_splits(context: int) -> int:
    """Return a row's number of splits, as computed by `paged_decode.split_size`."""
    size = SPLIT_SIZE * max(1, -(-context // (SPLIT_SIZE * MAX_SPLITS)))
    return -(-context // size)


def vision_work(patches: int, block_m: int) -> Work:
    """Return the work of one image with full attention."""
    numbers = 4 * patches * VISION_HEADS * VISION_HEAD_DIM
    operations = 4 * VISION_HEAD_DIM * VISION_HEADS * patches**2
    grid = count_tiles((patches,), block_m) * VISION_HEADS
    return Work(f"{patches} patches", 2 * numbers, operations, grid)


def norm_work(size: int, tokens: int, residual: bool) -> Work:
    """Return the work of RMSNorm; with a residual, it is read and the sum is written as well."""
    numbers = tokens * size * (4 if residual else 2) + size
    return Work(f"{tokens} tokens", 2 * numbers, (5 if residual else 4) * tokens * size, tokens)


def swiglu_work(inner: int, tokens: int) -> Work:
    grid = tokens * -(-inner // SWIGLU["BLOCK_SIZE"])
    return Work(f"{tokens} tokens", 2 * 3 * tokens * inner, 5 * tokens * inner, grid)


def mrope_work(shape: Shape, tokens: int) -> Work:
    """Return the work of M-RoPE on all heads; tokens have float32 cosines and sines, and a slot."""
    heads = shape.heads + 2 * shape.kv_heads
    token = 2 * 2 * heads * HEAD_DIM + 4 * HEAD_DIM + 8
    operations = 3 * (shape.heads + shape.kv_heads) * HEAD_DIM * tokens
    return Work(f"{tokens} tokens", tokens * token, operations, tokens * shape.kv_heads)


def patches_work(side: int) -> Work:
    """Return the work of cutting a square uint8 image, duplicated into two temporal frames."""
    count, size = (side // 14) ** 2, 3 * 2 * 14 * 14
    written = 2 * count * size
    return Work(f"{side}×{side} pixels", 3 * side**2 + written, 2 * count * size, count)


def token_works(shape: Shape) -> Iterator[tuple[str, Work]]:
    """Yield (kernel, work) of the kernels whose work does not depend on their tiles."""
    for tokens in TOKENS:
        yield "rms_norm", norm_work(shape.hidden, tokens, residual=False)
        yield "add_rms_norm", norm_work(shape.hidden, tokens, residual=True)
        yield "swiglu", swiglu_work(shape.inner, tokens)
        yield "mrope_write_kv", mrope_work(shape, tokens)
    for rows, context in DECODES:
        yield "paged_decode", decode_work(shape, rows, context)
        yield "paged_decode_fp8", decode_work(shape, rows, context, fp8=True)
        yield "join_splits", join_work(shape, rows, context)
    for side in IMAGES:
        yield "cut_patches", patches_work(side)


def chunk_cases() -> Iterator[tuple[int, int]]:
    """Yield (tokens, context) of whole prompts and of chunks at the end of long ones."""
    for tokens in CHUNKS:
        yield from ((tokens, context) for context in (tokens, *CONTEXTS))
