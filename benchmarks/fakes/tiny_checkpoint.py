"""Write a random Qwen2-VL checkpoint of a few hundred kilobytes, for tests and benchmarks.

The folder has all the files of a real checkpoint (config, weights, tokenizer, chat template,
generation and preprocessing settings), and transformers loads it too. Outputs are meaningless but
varied: the weights are scaled so that greedy decoding does not repeat a single token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .tiny_tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_IDS,
    SPECIAL_TOKENS,
    write_json,
    write_settings,
    write_tokenizer,
)

__all__ = [
    "CHAT_TEMPLATE",
    "SPECIAL_IDS",
    "SPECIAL_TOKENS",
    "checkpoint_shapes",
    "nested_name",
    "write_tiny_checkpoint",
]


def write_tiny_checkpoint(
    folder: Path | str,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vision_layers: int = 2,
    vision_heads: int = 2,
    vision_head_dim: int = 16,
    tied: bool = True,
    nested_names: bool = False,
    nested_config: bool = False,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    vocab_size: int = 288,
    max_position_embeddings: int = 4096,
) -> Path:
    """Write the folder (created if missing) and return its path.

    `nested_names` and `nested_config` select the newer layouts of tensor names and of config.json;
    `shards` > 1 writes that many safetensors files and an index. `vocab_size` may exceed the
    tokenizer's 270 tokens, as in real checkpoints. `head_dim` must be a multiple of 8.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vision_layers=vision_layers,
        vision_heads=vision_heads,
        vision_head_dim=vision_head_dim,
        tied=tied,
        dtype=dtype,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
    )
    write_json(folder / "config.json", nest_config(config) if nested_config else config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        nested_name(name) if nested_names else name: _random(name, shape, generator).to(
            getattr(torch, dtype)
        )
        for name, shape in checkpoint_shapes(config)
    }
    _write_weights(folder, tensors, shards)
    write_tokenizer(folder)
    write_settings(folder)
    return folder


def tiny_config(
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vision_layers: int,
    vision_heads: int,
    vision_head_dim: int,
    tied: bool,
    dtype: str,
    vocab_size: int,
    max_position_embeddings: int,
) -> dict[str, Any]:
    """Return a config.json in the older, flat layout of the 2B, 7B and 72B checkpoints."""
    side = 3 * head_dim // 16  # 24 of 64 in the real models
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": SPECIAL_IDS["<|endoftext|>"],
        "eos_token_id": SPECIAL_IDS["<|im_end|>"],
        "vision_start_token_id": SPECIAL_IDS["<|vision_start|>"],
        "vision_end_token_id": SPECIAL_IDS["<|vision_end|>"],
        "vision_token_id": SPECIAL_IDS["<|vision_pad|>"],
        "image_token_id": SPECIAL_IDS["<|image_pad|>"],
        "video_token_id": SPECIAL_IDS["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim,
        "max_position_embeddings": max_position_embeddings,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_sliding_window": False,
        "vision_config": {
            "depth": vision_layers,
            "embed_dim": vision_heads * vision_head_dim,
            "mlp_ratio": 2,
            "num_heads": vision_heads,
            "in_chans": 3,
            "in_channels": 3,
            "hidden_size": heads * head_dim,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "model_type": "qwen2_vl",
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [head_dim // 2 - 2 * side, side, side]},
        "vocab_size": vocab_size,
    }


def nest_config(flat: dict[str, Any]) -> dict[str, Any]:
    """Convert a flat config to the newer layout: `text_config` and `rope_parameters`."""
    stays = {"architectures", "model_type", "vision_config", "torch_dtype", "tie_word_embeddings"}
    stays |= {name for name in flat if name.endswith("token_id") and name[0] in "vi"}
    moved = {name: value for name, value in flat.items() if name not in stays}
    section = moved.pop("rope_scaling")["mrope_section"]
    moved["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": moved.pop("rope_theta"),
        "mrope_section": section,
    }
    moved["model_type"] = "qwen2_vl_text"
    moved["dtype"] = flat["torch_dtype"]
    kept = {name: flat[name] for name in stays if name != "torch_dtype"}
    return {**kept, "dtype": flat["torch_dtype"], "text_config": moved}


def nested_name(name: str) -> str:
    """Convert an older tensor name to the newer one."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def checkpoint_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names (older layout) and shapes of all tensors of a flat config's checkpoint."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _decoder_layer_shapes(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)
    vision = config["vision_config"]
    dim, patch = vision["embed_dim"], vision["patch_size"]
    yield "visual.patch_embed.proj.weight", (dim, 3, vision["temporal_patch_size"], patch, patch)
    for layer in range(vision["depth"]):
        for name, shape in _vision_block_shapes(dim, int(dim * vision["mlp_ratio"])):
            yield f"visual.blocks.{layer}.{name}", shape
    merged = dim * vision["spatial_merge_size"] ** 2
    yield from _pair("visual.merger.ln_q", (dim,))
    yield from _pair("visual.merger.mlp.0", (merged, merged))
    yield from _pair("visual.merger.mlp.2", (vision["hidden_size"], merged))


def _decoder_layer_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "input_layernorm.weight", (hidden,)
    yield from _pair("self_attn.q_proj", (hidden, hidden))
    yield from _pair("self_attn.k_proj", (kv, hidden))
    yield from _pair("self_attn.v_proj", (kv, hidden))
    yield "self_attn.o_proj.weight", (hidden, hidden)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _vision_block_shapes(dim: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _pair("norm1", (dim,))
    yield from _pair("attn.qkv", (3 * dim, dim))
    yield from _pair("attn.proj", (dim, dim))
    yield from _pair("norm2", (dim,))
    yield from _pair("mlp.fc1", (inner, dim))
    yield from _pair("mlp.fc2", (dim, inner))


def _pair(name: str, weight: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return noise * 0.1
    if len(shape) == 1:  # a norm's weight
        return 1 + noise * 0.1
    if "embed_tokens" in name or "lm_head" in name:
        return noise * 0.25  # small, or a tied head repeats its input
    return noise * 1.5 / math.prod(shape[1:]) ** 0.5


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
