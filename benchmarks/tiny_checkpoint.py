"""Writes a random Qwen2-VL checkpoint folder of a few hundred kilobytes, for tests and benchmarks.

The folder holds what a real one holds: config, weights, tokenizer, chat template, generation and
preprocessing settings; transformers loads it too. Its answers mean nothing, but they are spread:
the weights are scaled so that greedy decoding does not fall into one token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# In the order of the real vocabulary, where <|endoftext|> is 151643.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIRST_SPECIAL = 256  # the tiny tokenizer's regular tokens are the 256 bytes
SPECIAL_IDS = {token: FIRST_SPECIAL + i for i, token in enumerate(SPECIAL_TOKENS)}

PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2-VL's own template, as every checkpoint of it holds.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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
    """Writes the folder (made if missing) and returns its path.

    `nested_names` and `nested_config` choose the newer forms of tensor names and of config.json;
    `shards` > 1 writes that many safetensors files and their index. `vocab_size` may exceed the
    tokenizer's 270 tokens, as in the real models. `head_dim` must be a multiple of 8.
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
    _write_json(folder / "config.json", nest_config(config) if nested_config else config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        nested_name(name) if nested_names else name: _random(name, shape, generator).to(
            getattr(torch, dtype)
        )
        for name, shape in checkpoint_shapes(config)
    }
    _write_weights(folder, tensors, shards)
    _write_tokenizer(folder)
    _write_settings(folder)
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
    """A config.json in the older, flat form, as the 2B, 7B and 72B checkpoints have it."""
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
    """The newer form of a flat config: text fields under `text_config`, `rope_parameters`."""
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
    """The newer tensor name of an older one."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def checkpoint_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names (older form) and shapes of every tensor that a flat config's checkpoint holds."""
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
        return noise * 0.25  # small beside what the layers add, or a tied head repeats its input
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
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "model_max_length": 32768,
            "chat_template": CHAT_TEMPLATE,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_settings(folder: Path) -> None:
    ends = [SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|endoftext|>"]]
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ends[1],
            "pad_token_id": ends[1],
            "do_sample": True,
            "eos_token_id": ends,
            "repetition_penalty": 1.0,
            "temperature": 0.01,
            "top_p": 0.001,
            "top_k": 1,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
