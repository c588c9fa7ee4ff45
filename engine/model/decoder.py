"""Qwen2-VL's decoder over a paged KV cache: grouped-query attention with M-RoPE, SwiGLU.

Follows transformers' `Qwen2VLTextModel`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ...kernels.activation import swiglu
from ...kernels.decoder_layers import PanelLayer, PanelLayers
from ...kernels.kv_cache import Cache, Fp8Cache
from ...kernels.linear import by_rows
from ...kernels.mrope import mrope_cos_sin, mrope_write_kv
from ...kernels.paged_attention import AttentionBatch, paged_attention
from ...kernels.paged_attention_cpu import reads_in_place
from ...kernels.panel_linear import PanelWeight
from ..config.engine_config import ModelConfig
from .layers import (
    MergedColumnParallelLinear,
    ParallelHead,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from .parallel import TensorParallel
from .weights import WeightLoader

LayerCache = tuple[Cache, Cache]  # K and V [num_blocks, kv_heads, block_size, d]


class Attention(nn.Module):
    """Grouped-query attention of one layer, [n, hidden] to [n, hidden]."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel, layer: int) -> None:
        super().__init__()
        self.qkv = QKVParallelLinear(config, parallel, config.stored(layer, "self_attn.q_proj"))
        width = config.num_attention_heads * config.head_dim
        stored = config.stored(layer, "self_attn.o_proj")
        self.o_proj = RowParallelLinear(width, config.hidden_size, parallel, stored)
        self.scale = config.head_dim**-0.5

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        """Return the attention output [n, hidden], and write keys and values to `cache`.

        x: [n, hidden]. rotary: cosines and sines, float32 [n, head_dim / 2].
        """
        q, k, v = self.qkv.split(self.qkv(x))
        q = mrope_write_kv(q, k, v, *rotary, *cache, batch.slot_mapping)
        return self.o_proj(paged_attention(q, *cache, batch, self.scale).flatten(1))

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.qkv.weight_loaders(name)
        yield from self.o_proj.weight_loaders(f"{name}.o_proj")


class MLP(nn.Module):
    """SwiGLU MLP of one layer, [n, hidden] to [n, hidden]."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel, layer: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        names = ("gate_proj", "up_proj")
        stored = config.stored(layer, "mlp.gate_proj")
        self.gate_up = MergedColumnParallelLinear(hidden, inner, names, parallel, stored)
        self.down = RowParallelLinear(
            inner, hidden, parallel, config.stored(layer, "mlp.down_proj")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output [n, hidden] of x [n, hidden]."""
        return self.down.reduce(by_rows(self._products, x))

    def _products(self, x: torch.Tensor) -> torch.Tensor:
        return self.down.weight(swiglu(self.gate_up(x)))

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.gate_up.weight_loaders(name)
        yield from self.down.weight_loaders(f"{name}.down_proj")


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer. The residual addition is deferred to the next norm."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel, layer: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, parallel, layer)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, parallel, layer)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the MLP's output and the residual to add to it, both [n, hidden].

        residual: None in the first layer, whose input is the embeddings.
        """
        if residual is None:
            residual, x = x, self.input_norm(x)
        else:
            x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, rotary, cache, batch)
        x, residual = self.post_norm.add(x, residual)
        return self.mlp(x), residual

    def panels(self, cache: LayerCache) -> PanelLayer | None:
        """Return the weights for `PanelLayers`.

        Returns None unless all weights are in panels and unsharded, and the CPU attention kernel
        supports the cache.
        """
        qkv, o_proj = self.attention.qkv, self.attention.o_proj
        linears = (qkv, o_proj, self.mlp.gate_up, self.mlp.down)
        held = [layer.weight.weight for layer in linears]
        panels = [weight for weight in held if isinstance(weight, PanelWeight)]
        whole = o_proj.parallel.size == 1 and len(panels) == len(held)
        k_cache, v_cache = cache
        if not whole or isinstance(k_cache, Fp8Cache) or isinstance(v_cache, Fp8Cache):
            return None
        if not reads_in_place(k_cache, qkv.sizes[0] // qkv.sizes[1]):
            return None
        norms = (self.input_norm.weight, self.post_norm.weight)
        first, o, gate_up, down = panels
        return PanelLayer(*norms, first, qkv.weight.bias, o, gate_up, down, k_cache, v_cache)

    def weight_loaders(self, name: str) -> Iterator[WeightLoader]:
        yield from self.input_norm.weight_loaders(f"{name}.input_layernorm")
        yield from self.attention.weight_loaders(f"{name}.self_attn")
        yield from self.post_norm.weight_loaders(f"{name}.post_attention_layernorm")
        yield from self.mlp.weight_loaders(f"{name}.mlp")


class Decoder(nn.Module):
    """Decoder of one rank: embedding, layers, final norm and LM head.

    Inputs and outputs are in the model's dtype. The modules are created by `Qwen2VL`.
    """

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, hidden, parallel)
        layers = [DecoderLayer(config, parallel, at) for at in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.head = ParallelHead(self.embed_tokens, config.tie_word_embeddings)
        self.mrope_section = config.mrope_section
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
        self.inv_freq = 1.0 / config.rope_theta ** (exponents / config.head_dim)
        self._panels: tuple[list[LayerCache], PanelLayers | None] | None = None  # for these caches

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        caches: list[LayerCache],
        batch: AttentionBatch,
        sample_at: torch.Tensor,
    ) -> torch.Tensor | None:
        """Run a step.

        Args:
            hidden: Embeddings [n, hidden]; may be overwritten.
            positions: M-RoPE positions, int32 [3, n] (temporal, height, width).
            caches: K and V of each layer, [num_blocks, kv_heads, block_size, head_dim] each. The
                step's keys and values are written to them.
            batch: Attention metadata of the step.
            sample_at: Tokens to return logits of, int64 [s].

        Returns logits [s, vocab_size] on rank 0; None on other ranks, or if s is 0.
        """
        return self.logits(*self.run(hidden, positions, caches, batch), sample_at)

    def run(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        caches: list[LayerCache],
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layers, and return the last layer's output and residual, both [n, hidden].

        Arguments are those of `forward`; pass the results to `logits`.
        """
        rotary = mrope_cos_sin(positions, self.inv_freq, self.mrope_section)
        return self._run_layers(hidden, rotary, caches, batch)

    def logits(
        self, hidden: torch.Tensor, residual: torch.Tensor, sample_at: torch.Tensor
    ) -> torch.Tensor | None:
        """Return logits [s, vocab_size] of tokens `sample_at`, int64 [s], on rank 0.

        hidden, residual: results of `run`. Returns None on other ranks, or if s is 0.
        """
        if sample_at.numel() == 0:
            return None
        normed, _ = self.norm.add(hidden[sample_at], residual[sample_at])
        return self.head(normed)

    def _run_layers(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        caches: list[LayerCache],
        batch: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last layer's output and its residual."""
        if PanelLayers.serves(hidden) and (together := self._together(caches)) is not None:
            return together(hidden, rotary, batch)
        residual = None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, residual = layer(hidden, residual, rotary, cache, batch)
        assert residual is not None, "the decoder has no layers"
        return hidden, residual

    def _together(self, caches: list[LayerCache]) -> PanelLayers | None:
        """Return the layers for a single C call, or None if their weights do not allow it."""
        if self._panels is None or self._panels[0] is not caches:
            layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
            parts = [layer.panels(cache) for layer, cache in zip(layers, caches, strict=True)]
            fit = [part for part in parts if part is not None]
            settings = (layers[0].input_norm.eps, layers[0].attention.scale)
            whole = len(fit) == len(parts)
            self._panels = (caches, PanelLayers.of(fit, *settings) if whole else None)
        return self._panels[1]

    def weight_loaders(self) -> Iterator[WeightLoader]:
        yield from self.embed_tokens.weight_loaders("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            yield from layer.weight_loaders(f"model.layers.{index}")  # type: ignore[operator]
        yield from self.norm.weight_loaders("model.norm")
        yield from self.head.weight_loaders("lm_head")
