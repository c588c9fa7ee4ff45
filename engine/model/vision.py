"""Qwen2-VL's vision tower: 2-D rotary positions, full attention within each frame, merger.

Follows transformers' `Qwen2VisionTransformerPretrainedModel`. Weights are replicated on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ...kernels.activation import quick_gelu
from ...kernels.linear import by_rows, in_few_shapes
from ...kernels.mrope import rotate_heads
from ...kernels.vision_attention import vision_attention
from ..config.engine_config import VisionConfig
from .layers import LayerNorm, Linear
from .weights import WeightLoader

Grid = tuple[int, int, int]  # temporal patches, rows and columns of patches
ROTARY_BASE = 10000.0


class VisionAttention(nn.Module):
    """Multi-head attention within each frame, [n, embed_dim] to [n, embed_dim]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)
        self.heads, self.head_dim = config.num_heads, config.head_dim

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor,
        seqlens: tuple[int, ...],
    ) -> torch.Tensor:
        """Return the attention output [n, embed_dim] of x [n, embed_dim].

        rotary: cosines and sines, float32 [n, head_dim / 2]. Frames are given by `cu_seqlens`,
        int32 [frames + 1] on the device, and `seqlens` on the host.
        """
        q, k, v = self.qkv(x).view(-1, 3, self.heads, self.head_dim).unbind(1)
        q, k = rotate_heads(q, *rotary), rotate_heads(k, *rotary)
        out = vision_attention(q, k, v, cu_seqlens, seqlens, self.head_dim**-0.5)
        return self.proj(out.flatten(1))

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.qkv.weight_loaders(f"{name}.qkv")
        yield from self.proj.weight_loaders(f"{name}.proj")


class VisionBlock(nn.Module):
    """Pre-norm transformer block of the tower, [n, embed_dim] to [n, embed_dim]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner = int(config.embed_dim * config.mlp_ratio)
        self.norm1 = LayerNorm(config.embed_dim)
        self.attention = VisionAttention(config)
        self.norm2 = LayerNorm(config.embed_dim)
        self.fc1 = Linear(config.embed_dim, inner)
        self.fc2 = Linear(inner, config.embed_dim)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor,
        seqlens: tuple[int, ...],
    ) -> torch.Tensor:
        """Return the block's output [n, embed_dim]; see `VisionAttention.forward`."""
        x = x + self.attention(self.norm1(x), rotary, cu_seqlens, seqlens)
        return x + by_rows(self._mlp, x)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(quick_gelu(self.fc1(self.norm2(x))))

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.norm1.weight_loaders(f"{name}.norm1")
        yield from self.attention.weight_loaders(f"{name}.attn")
        yield from self.norm2.weight_loaders(f"{name}.norm2")
        yield from self.fc1.weight_loaders(f"{name}.mlp.fc1")
        yield from self.fc2.weight_loaders(f"{name}.mlp.fc2")


class Merger(nn.Module):
    """Merges each square of merge_size² patches into one embedding of the decoder's width.

    Maps [n, embed_dim] to [n / merge_size², hidden_size].
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.norm = LayerNorm(config.embed_dim)
        self.fc1 = Linear(self.width, self.width)
        self.fc2 = Linear(self.width, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return embeddings [n / merge_size², hidden_size] of x [n, embed_dim]."""
        return in_few_shapes(self._mlp, self.norm(x).view(-1, self.width))

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.norm.weight_loaders(f"{name}.ln_q")
        yield from self.fc1.weight_loaders(f"{name}.mlp.0")
        yield from self.fc2.weight_loaders(f"{name}.mlp.2")


class VisionTower(nn.Module):
    """Vision encoder: patches of images and videos to embeddings for the decoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        kernel = (config.in_channels, *patch)
        self.patch_embed = Linear(config.patch_dim, config.embed_dim, False, kernel)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
        self.merger = Merger(config)
        self.merge_size = config.spatial_merge_size
        width = config.head_dim // 2  # half of a head encodes the row, half the column
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
        self.inv_freq = 1.0 / ROTARY_BASE ** (exponents / width)

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Encode the patches of several units in one pass.

        Args:
            patches: [sum of t × h × w, patch_dim] in the model's dtype, from `cut_patches`: frame
                by frame, in merge_size × merge_size squares.
            grids: (t, h, w) of each unit, in patches. h and w are multiples of merge_size.

        Returns [sum of t × h × w / merge_size², hidden_size of the decoder], one token per square,
        in the same order.
        """
        device = patches.device
        seqlens = tuple(h * w for t, h, w in grids for _ in range(t))
        cu_seqlens = torch.tensor((0, *seqlens)).cumsum(0).to(device, torch.int32)
        rotary = self._rotary(grids, device)
        x = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, rotary, cu_seqlens, seqlens)
        return self.merger(x)

    def _rotary(
        self, grids: Sequence[Grid], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [patch_positions(h, w, self.merge_size).repeat(t, 1) for t, h, w in grids]
        positions = torch.cat(parts).to(device)
        angles = (positions[:, :, None].float() * self.inv_freq).flatten(1)
        return angles.cos(), angles.sin()

    def weight_loaders(self) -> Iterator[WeightLoader]:
        yield from self.patch_embed.weight_loaders("visual.patch_embed.proj")
        for index, block in enumerate(self.blocks):
            yield from block.weight_loaders(f"visual.blocks.{index}")  # type: ignore[operator]
        yield from self.merger.weight_loaders("visual.merger")


def patch_positions(height: int, width: int, merge_size: int) -> torch.Tensor:
    """Return (row, column) of each patch of a frame, int64 [h × w, 2], in square order."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    squares = (height // merge_size, merge_size, width // merge_size, merge_size)
    parts = [axis.reshape(squares).transpose(1, 2).flatten() for axis in (rows, columns)]
    return torch.stack(parts, dim=-1)
