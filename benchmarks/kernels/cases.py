"""Kernels at real shapes with random inputs, with their reference and torch's equivalent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from octavo.kernels.activation import swiglu, swiglu_ref
from octavo.kernels.kv_cache import gather_kv
from octavo.kernels.launch import architecture
from octavo.kernels.mrope import mrope_write_kv, mrope_write_kv_ref
from octavo.kernels.norm import add_rms_norm, add_rms_norm_ref
from octavo.kernels.paged_attention import AttentionBatch, paged_attention, paged_attention_ref
from octavo.kernels.paged_chunk import chunk_settings
from octavo.kernels.patches import cut_patches, cut_patches_ref
from octavo.kernels.tiles import chunk_splits
from octavo.kernels.vision_attention import settings as vision_settings
from octavo.kernels.vision_attention import vision_attention, vision_attention_ref

from .resources import BLOCK_SIZE, HEAD_DIM, VISION_HEAD_DIM, VISION_HEADS, Shape
from .work import (
    Work,
    chunk_work,
    decode_work,
    mrope_work,
    norm_work,
    patches_work,
    swiglu_work,
    vision_work,
)

Call = Callable[[], torch.Tensor]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. `peer` is torch's equivalent."""

    kernel: str
    shape: str
    work: Work
    multiplies: bool  # uses matrix units
    run: Call
    oracle: Call
    peer: Call | None


def attention_case(
    shape: Shape, rows: int, tokens: int, context: int, device: torch.device, dtype: torch.dtype
) -> Case:
    """Return attention of `rows` with the last `tokens` of `context`; `peer` has contiguous KV."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(rows * blocks).view(rows, blocks)
    lists = ([tokens] * rows, [context] * rows, tables.tolist(), BLOCK_SIZE, device)
    batch = AttentionBatch.from_lists(*lists)
    cache = (rows * blocks, shape.kv_heads, BLOCK_SIZE, HEAD_DIM)
    k_cache, v_cache = (torch.randn(cache, device=device, dtype=dtype) for _ in "kv")
    q = torch.randn(rows * tokens, shape.heads, HEAD_DIM, device=device, dtype=dtype)
    scale = HEAD_DIM**-0.5
    k, v = (gather_kv(x, batch.block_tables.long(), context) for x in (k_cache, v_cache))
    queries = q.view(rows, tokens, shape.heads, HEAD_DIM).transpose(1, 2)
    mask = None if tokens == 1 else causal_lower_right(tokens, context)

    def peer() -> torch.Tensor:
        made = F.scaled_dot_product_attention(queries, k, v, mask, scale=scale, enable_gqa=True)
        return made.transpose(1, 2).reshape(q.shape)

    heads_of = (shape.heads, shape.kv_heads, HEAD_DIM, BLOCK_SIZE, dtype, architecture(device))
    split = chunk_splits(tokens, context, shape.heads // shape.kv_heads, shape.kv_heads) > 1
    block_m = int(chunk_settings(*heads_of, (tokens,) * rows, split)["BLOCK_M"])
    one = chunk_work(shape, tokens, context, block_m)
    return Case(
        kernel="paged_decode" if tokens == 1 else "paged_chunk",
        shape=shape.name,
        work=decode_work(shape, rows, context) if tokens == 1 else one.times(rows),
        multiplies=True,
        run=lambda: paged_attention(q, k_cache, v_cache, batch, scale),
        oracle=lambda: paged_attention_ref(q, k_cache, v_cache, batch, scale),
        peer=peer,
    )


def vision_case(patches: int, device: torch.device, dtype: torch.dtype) -> Case:
    qkv = torch.randn(patches, 3, VISION_HEADS, VISION_HEAD_DIM, device=device, dtype=dtype)
    q, k, v = qkv.unbind(1)
    bounds = torch.tensor([0, patches], dtype=torch.int32, device=device)
    scale = VISION_HEAD_DIM**-0.5
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    block_m = int(vision_settings(VISION_HEAD_DIM, dtype, architecture(device))["BLOCK_M"])

    def peer() -> torch.Tensor:
        made = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return made[0].transpose(0, 1)

    return Case(
        kernel="vision_attention",
        shape="all",
        work=vision_work(patches, block_m),
        multiplies=True,
        run=lambda: vision_attention(q, k, v, bounds, (patches,), scale),
        oracle=lambda: vision_attention_ref(q, k, v, (patches,), scale),
        peer=peer,
    )


def norm_case(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    x, residual = (torch.randn(tokens, shape.hidden, device=device, dtype=dtype) for _ in "xr")
    weight = torch.rand(shape.hidden, device=device, dtype=dtype)
    return Case(
        kernel="add_rms_norm",
        shape=shape.name,
        work=norm_work(shape.hidden, tokens, residual=True),
        multiplies=False,
        run=lambda: add_rms_norm(x, residual, weight, 1e-6)[0],
        oracle=lambda: add_rms_norm_ref(x, residual, weight, 1e-6)[0],
        peer=lambda: F.rms_norm(x + residual, (shape.hidden,), weight, 1e-6),
    )


def swiglu_case(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    gate_up = torch.randn(tokens, 2 * shape.inner, device=device, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    return Case(
        kernel="swiglu",
        shape=shape.name,
        work=swiglu_work(shape.inner, tokens),
        multiplies=False,
        run=lambda: swiglu(gate_up),
        oracle=lambda: swiglu_ref(gate_up),
        peer=lambda: F.silu(gate) * up,
    )


def mrope_case(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
    qkv = torch.randn(tokens, sum(sizes), HEAD_DIM, device=device, dtype=dtype)
    q, k, v = qkv.split(sizes, dim=1)
    angles = torch.rand(tokens, HEAD_DIM // 2, device=device) * 1000
    cos, sin = angles.cos(), angles.sin()
    blocks = -(-tokens // BLOCK_SIZE)
    caches = [
        torch.zeros(blocks, shape.kv_heads, BLOCK_SIZE, HEAD_DIM, device=device, dtype=dtype)
        for _ in "kv"
    ]
    slots = torch.randperm(blocks * BLOCK_SIZE, device=device)[:tokens]
    args = (q, k, v, cos, sin, *caches, slots)

    def with_cache(turn: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return the queries and the cache contents."""
        turned = turn(*args)
        return torch.cat([turned.flatten(), *(cache.flatten() for cache in caches)])

    return Case(
        kernel="mrope_write_kv",
        shape=shape.name,
        work=mrope_work(shape, tokens),
        multiplies=False,
        run=lambda: with_cache(mrope_write_kv),
        oracle=lambda: with_cache(mrope_write_kv_ref),
        peer=None,
    )


def patches_case(side: int, device: torch.device, dtype: torch.dtype) -> Case:
    pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, device=device)
    return Case(
        kernel="cut_patches",
        shape="all",
        work=patches_work(side),
        multiplies=False,
        run=lambda: cut_patches(pixels, MEAN, STD, 14, 2, 2, dtype),
        oracle=lambda: cut_patches_ref(pixels, MEAN, STD, 14, 2, 2, dtype),
        peer=None,
    )


def cases(shape: Shape, device: torch.device, dtype: torch.dtype, scale: int = 1) -> Iterator[Case]:
    """Yield every kernel at the sizes of a shape, divided by `scale`.

    The sizes are chosen so that a reference implementation takes seconds on a GPU.
    """
    for rows, tokens, context in ((1, 512, 512), (1, 2048, 2048), (2, 512, 4096), (1, 512, 16_384)):
        yield attention_case(shape, rows, tokens // scale, context // scale, device, dtype)
    for rows, context in ((1, 4096), (16, 4096), (64, 4096), (1, 32_768), (16, 32_768)):
        rows = max(1, rows // scale)
        yield attention_case(shape, rows, 1, context // scale, device, dtype)
    for patches in (1024, 4096):
        yield vision_case(patches // scale, device, dtype)
    for tokens in (64, 8192):
        tokens = max(3, tokens // scale)
        yield norm_case(shape, tokens, device, dtype)
        yield swiglu_case(shape, tokens, device, dtype)
        yield mrope_case(shape, tokens, device, dtype)
    yield patches_case(max(28, 896 // scale // 28 * 28), device, dtype)
