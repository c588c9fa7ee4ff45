"""Full attention within each frame of the vision tower, for frames of varying length.

Tensor cores need power-of-two sizes. A head of 80 is split in 64 + 16 rather than padded to 128.
Source of the online softmax: FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import native
from .device import uses_triton
from .launch import architecture, launch
from .online_softmax import LOG2_E, fold
from .tiles import cut_tiles


@triton.jit
def _load_rows(
    base_ptr,
    rows,
    row_stride,
    end,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load columns [START, START + BLOCK) of some rows.

    Columns from HEAD_DIM on are zero and, if MASKED, so are rows from `end` on.
    """
    offs = START + tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * row_stride + offs[None, :]
    if MASKED or START + BLOCK > HEAD_DIM:
        mask = (rows < end)[:, None] & (offs < HEAD_DIM)[None, :]
        return tl.load(base_ptr + at, mask=mask, other=0.0)
    return tl.load(base_ptr + at)


@triton.jit
def _attend_frame(
    q,
    q_rest,
    acc,
    acc_rest,
    top,
    total,
    begin,
    end,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Accumulate keys [begin, end). If not MASKED, they must fill whole tiles."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, keys, k_stride, end, 0, BLOCK_MAIN, HEAD_DIM, MASKED)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if BLOCK_REST > 0:
            k_rest = _load_rows(
                k_ptr, keys, k_stride, end, BLOCK_MAIN, BLOCK_REST, HEAD_DIM, MASKED
            )
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision=PRECISION)
        scores = scores * scale
        if MASKED:
            scores = tl.where((keys < end)[None, :], scores, float("-inf"))
        weights, fade, top, total = fold(scores, top, total)
        v = _load_rows(v_ptr, keys, v_stride, end, 0, BLOCK_MAIN, HEAD_DIM, MASKED)
        weights = weights.to(v.dtype)
        acc = tl.dot(weights, v, acc * fade[:, None], input_precision=PRECISION)
        if BLOCK_REST > 0:
            v_rest = _load_rows(
                v_ptr, keys, v_stride, end, BLOCK_MAIN, BLOCK_REST, HEAD_DIM, MASKED
            )
            acc_rest = tl.dot(weights, v_rest, acc_rest * fade[:, None], input_precision=PRECISION)
    return acc, acc_rest, top, total


@triton.jit
def _vision_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_ptr,
    tile_frame_ptr,
    tile_start_ptr,
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend BLOCK_M queries of one frame and one head per program."""
    tile, head = tl.program_id(0), tl.program_id(1)
    frame = tl.load(tile_frame_ptr + tile)
    first = tl.load(cu_seqlens_ptr + frame)
    last = tl.load(cu_seqlens_ptr + frame + 1)
    q_ptr += head * HEAD_DIM
    k_ptr += head * HEAD_DIM
    v_ptr += head * HEAD_DIM
    out_ptr += head * HEAD_DIM

    REST: tl.constexpr = max(BLOCK_REST, 16)  # unused if BLOCK_REST is 0
    rows = first + tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = rows < last
    q = _load_rows(q_ptr, rows, q_stride, last, 0, BLOCK_MAIN, HEAD_DIM, True)
    q_rest = _load_rows(q_ptr, rows, q_stride, last, BLOCK_MAIN, REST, HEAD_DIM, True)
    acc = tl.zeros((BLOCK_M, BLOCK_MAIN), tl.float32)
    acc_rest = tl.zeros((BLOCK_M, REST), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole = first + (last - first) // BLOCK_N * BLOCK_N
    acc, acc_rest, top, total = _attend_frame(
        q, q_rest, acc, acc_rest, top, total, first, whole, k_ptr, v_ptr, k_stride, v_stride, scale,
        HEAD_DIM, BLOCK_MAIN, BLOCK_REST, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    acc, acc_rest, top, total = _attend_frame(
        q, q_rest, acc, acc_rest, top, total, whole, last, k_ptr, v_ptr, k_stride, v_stride, scale,
        HEAD_DIM, BLOCK_MAIN, BLOCK_REST, BLOCK_N, PRECISION, True,
    )  # fmt: skip

    offs = tl.arange(0, BLOCK_MAIN)
    out = out_ptr + rows[:, None].to(tl.int64) * out_stride
    dtype = out_ptr.dtype.element_ty
    mask = row_mask[:, None] & (offs < HEAD_DIM)[None, :]
    tl.store(out + offs[None, :], (acc / total[:, None]).to(dtype), mask=mask)
    if BLOCK_REST > 0:
        offs_rest = BLOCK_MAIN + tl.arange(0, BLOCK_REST)
        mask_rest = row_mask[:, None] & (offs_rest < HEAD_DIM)[None, :]
        value = (acc_rest / total[:, None]).to(dtype)
        tl.store(out + offs_rest[None, :], value, mask=mask_rest)


def settings(head_dim: int, dtype: torch.dtype, arch: str) -> dict[str, int | str]:
    """Return compile-time settings; the head is split in a power of two and a rest of >= 16."""
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_MAIN": main,
        "BLOCK_REST": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0,
        "PRECISION": "tf32" if dtype.itemsize == 2 else "ieee",
        **launch("vision", arch, dtype).settings(),
    }


def vision_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seqlens: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    """Compute bidirectional attention within each frame.

    Args:
        q, k, v: [n, heads, d], all of one dtype. The heads of a token must be contiguous.
        cu_seqlens: int32 [frames + 1] on the device; frame i is tokens
            [cu_seqlens[i], cu_seqlens[i + 1]).
        seqlens: Lengths of the frames, on the host.
        scale: Factor of the scores, usually d ** -0.5.

    Returns [n, heads, d] in q's dtype. Raises AssertionError for other strides.
    """
    if native.serves_heads(q) and native.attends_frames():
        return _native_vision_attention(q, k, v, seqlens, scale)
    if not uses_triton(q):
        return _vision_attention_cpu(q, k, v, seqlens, scale)
    n, heads, head_dim = q.shape
    for part in (q, k, v):
        assert part.stride()[1:] == (head_dim, 1), "the heads of a token must be contiguous"
    chosen = settings(head_dim, q.dtype, architecture(q.device))
    frames, starts = cut_tiles(seqlens, int(chosen["BLOCK_M"]), q.device)
    out = torch.empty((n, heads, head_dim), dtype=q.dtype, device=q.device)
    _vision_attention_kernel[(len(frames), heads)](
        q,
        k,
        v,
        out,
        cu_seqlens,
        frames,
        starts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        out.stride(0),
        scale * LOG2_E,
        **chosen,
    )
    return out


def _native_vision_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqlens: tuple[int, ...], scale: float
) -> torch.Tensor:
    n, heads, head_dim = q.shape
    for part in (q, k, v):
        assert part.stride() == (q.stride(0), head_dim, 1), "q, k and v must have equal strides"
    size, start, tiles = native.TILE_ROWS, 0, []
    for length in seqlens:
        end = start + length
        tiles += [(start, end, at, min(size, end - at)) for at in range(start, end, size)]
        start = end
    out = torch.empty((n, heads, head_dim), dtype=q.dtype)
    table = torch.tensor(tiles, dtype=torch.int32)
    native.call(
        "octavo_vision_attention",
        *(q, k, v, q.stride(0), out, table, len(tiles), heads, head_dim, scale * LOG2_E),
    )
    return out


def _vision_attention_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqlens: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Run torch's attention, with consecutive frames of equal length as one batch."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    start = 0
    for length, count in _runs(seqlens):
        end = start + length * count
        frames = [x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
        made = torch.nn.functional.scaled_dot_product_attention(
            frames[0], frames[1], frames[2], scale=scale
        )
        out[start:end] = made.transpose(1, 2).flatten(0, 1)
        start = end
    return out


def _runs(seqlens: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return runs of equal lengths as (length, count)."""
    runs: list[tuple[int, int]] = []
    for length in seqlens:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def vision_attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqlens: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Compute `vision_attention` frame by frame in float32 (test oracle).

    q, k, v [n, heads, d]; returns [n, heads, d] in q's dtype.
    """
    parts = zip(*(x.float().split(list(seqlens)) for x in (q, k, v)), strict=True)
    out = []
    for q_i, k_i, v_i in parts:
        weights = torch.einsum("qhd,khd->hqk", q_i, k_i).mul(scale).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v_i))
    return torch.cat(out).to(q.dtype)
