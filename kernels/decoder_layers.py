"""All decoder layers over few rows in one C call, for CPUs with weights in panels.

Runs the same kernels as the layers one by one (`engine/model/decoder.py`), with bit-identical
results. It avoids Python between kernels, which took a tenth of a step: each weight that streams
through the CPU cache evicts the interpreter's code and data.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import native
from .attention_batch import AttentionBatch
from .linear import PACKED_ROWS
from .paged_attention_cpu import LOG2_E, plan_attention
from .panel_linear import PanelWeight

Address, Long, Float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Linear(ctypes.Structure):  # these three structures match native/layers.c
    _fields_ = (
        *((name, Address) for name in ("panels", "bias", "scale", "zero")),
        *((name, Long) for name in ("n", "words")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Address) for name in ("input_norm", "post_norm")),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, Address) for name in ("k_cache", "v_cache")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, Long) for name in ("rows", "size", "heads", "kv_heads", "dim", "block_size")),
        *((name, Float) for name in ("eps", "scale")),
        *((name, Address) for name in ("cos", "sin", "slots", "tables", "tiles", "parts", "joins")),
        *((name, Long) for name in ("table_stride", "num_tiles", "num_parts", "num_joins")),
        ("seconds", Address),
        *((name, Address) for name in ("residual", "x", "normed", "qkv", "q", "attended")),
        *((name, Address) for name in ("gate_up", "active")),
        *((name, Address) for name in ("numbers", "row_scale", "partial", "lse")),
    )


@dataclass(frozen=True, eq=False)
class PanelLayer:
    """Weights and KV cache of a layer; tensors are bfloat16."""

    input_norm: torch.Tensor  # [size]
    post_norm: torch.Tensor
    qkv: PanelWeight
    qkv_bias: torch.Tensor | None  # [out]
    o: PanelWeight
    gate_up: PanelWeight
    down: PanelWeight
    k_cache: torch.Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    v_cache: torch.Tensor


@dataclass(frozen=True, eq=False)
class PanelLayers:
    """All layers of a decoder, and their addresses for the C kernel."""

    layers: Sequence[PanelLayer]
    eps: float  # epsilon of the norms
    scale: float  # factor of attention scores
    addresses: ctypes.Array[_Layer]  # C structures of `layers`

    @property
    def weights(self) -> list[PanelWeight]:
        return [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    @property
    def kv_heads(self) -> int:
        return self.layers[0].k_cache.shape[1]

    @property
    def head_dim(self) -> int:
        return self.layers[0].k_cache.shape[3]

    @property
    def heads(self) -> int:
        """Return the number of query heads."""
        return self.layers[0].o.in_size // self.head_dim

    @classmethod
    def of(
        cls,
        layers: Sequence[PanelLayer],
        eps: float,
        scale: float,
    ) -> PanelLayers:
        """Create from layers; `eps` is that of the norms, `scale` that of attention scores."""
        addresses = (_Layer * len(layers))(*map(_layer, layers))
        return cls(layers, eps, scale, addresses)

    @staticmethod
    def serves(hidden: torch.Tensor) -> bool:
        """Return whether `hidden` [n, size] is small enough to profit."""
        return 0 < len(hidden) <= PACKED_ROWS

    def __call__(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch: AttentionBatch,
        seconds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all layers.

        Args:
            hidden: Embeddings, bfloat16 [n, size]. Overwritten with the residual.
            rotary: Cosines and sines, float32 [n, d / 2].
            batch: Attention metadata of the step.
            seconds: float64 [2], incremented by the time of products and of attention, or None.

        Returns the last layer's output and the residual to add to it, both [n, size].
        """
        plan = plan_attention(batch, self.heads // self.kv_heads, self.kv_heads)
        memory = self._memory(hidden.contiguous(), plan.num_joined)
        inputs = {
            "cos": rotary[0].contiguous(),
            "sin": rotary[1].contiguous(),
            "slots": batch.slot_mapping,
            "tables": batch.block_tables,
            "tiles": plan.tiles,
            "parts": plan.parts,
            "joins": plan.joins,
        }
        step = _Step(
            rows=len(hidden),
            size=hidden.shape[1],
            heads=self.heads,
            kv_heads=self.kv_heads,
            dim=self.head_dim,
            block_size=self.layers[0].k_cache.shape[2],
            eps=self.eps,
            scale=self.scale * LOG2_E,
            table_stride=batch.block_tables.stride(0),
            num_tiles=len(plan.tiles),
            num_parts=len(plan.parts),
            num_joins=len(plan.joins),
            seconds=None if seconds is None else seconds.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in (memory | inputs).items()},
        )
        at = ctypes.addressof(self.addresses)
        native.call("octavo_decoder_layers", at, len(self.layers), ctypes.addressof(step))
        return memory["x"], memory["residual"]

    def _memory(self, hidden: torch.Tensor, num_joined: int) -> dict[str, torch.Tensor]:
        """Return the buffers of intermediate results."""
        (n, size), layer, width = hidden.shape, self.layers[0], self.heads * self.head_dim
        new, widest = hidden.new_empty, max(layer.qkv.in_size, layer.o.in_size, layer.down.in_size)
        return {
            "residual": hidden,
            "x": new(n, size),
            "normed": new(n, size),
            "qkv": new(n, layer.qkv.out_size),
            "q": new(n, width),
            "attended": new(n, width),
            "gate_up": new(n, layer.gate_up.out_size),
            "active": new(n, layer.down.in_size),
            "numbers": torch.empty(n, widest, dtype=torch.uint8),
            "row_scale": torch.empty(n, dtype=torch.float32),
            "partial": torch.empty(num_joined, width, dtype=torch.float32),
            "lse": torch.empty(num_joined, self.heads, dtype=torch.float32),
        }


def _layer(layer: PanelLayer) -> _Layer:
    linears = (
        _linear(layer.qkv, layer.qkv_bias),
        *(_linear(weight, None) for weight in (layer.o, layer.gate_up, layer.down)),
    )
    norms = (layer.input_norm.data_ptr(), layer.post_norm.data_ptr())
    return _Layer(*norms, *linears, layer.k_cache.data_ptr(), layer.v_cache.data_ptr())


def _linear(weight: PanelWeight, bias: torch.Tensor | None) -> _Linear:
    held = (weight.panels, bias, weight.scale, weight.zero)
    addresses = (None if each is None else each.data_ptr() for each in held)
    return _Linear(*addresses, weight.out_size, weight.panels.shape[1])
