"""Write the embedded checkpoint (a Hugging Face Qwen2-VL folder) from the training state."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from octavo.benchmarks.fakes.tiny_checkpoint import CHAT_TEMPLATE
from octavo.engine.config.engine_config import EMBEDDED_MODEL

from .batch import IMAGE_PIXELS, VIDEO_PIXELS
from .model import Shape


def config_of(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return config.json in the flat layout of the real checkpoints."""
    ids = {
        name: tokenizer.token_to_id(f"<|{name}|>")
        for name in (
            "endoftext",
            "im_end",
            "vision_start",
            "vision_end",
            "vision_pad",
            "image_pad",
            "video_pad",
        )
    }
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "vision_token_id": ids["vision_pad"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "max_position_embeddings": 8192,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": shape.theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": shape.v_layers,
            "embed_dim": shape.v_dim,
            "mlp_ratio": 4,
            "num_heads": shape.v_heads,
            "in_chans": 3,
            "in_channels": 3,
            "hidden_size": shape.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "model_type": "qwen2_vl",
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.section)},
        "vocab_size": shape.vocab,
    }


def settings_of(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the other JSON files of the folder by name."""
    ends = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    picture = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Qwen2VLProcessor",
    }
    return {
        "generation_config.json": {
            "bos_token_id": ends[1],
            "pad_token_id": ends[1],
            "eos_token_id": ends,
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "min_pixels": IMAGE_PIXELS[0],
            "max_pixels": IMAGE_PIXELS[1],
            "image_processor_type": "Qwen2VLImageProcessor",
            **picture,
        },
        "video_preprocessor_config.json": {
            "min_pixels": VIDEO_PIXELS[0],
            "max_pixels": VIDEO_PIXELS[1],
            "video_processor_type": "Qwen2VLVideoProcessor",
            **picture,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "model_max_length": 8192,
            "chat_template": CHAT_TEMPLATE,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def export(state_file: Path, tokenizer_file: Path, folder: Path) -> None:
    """Export the averaged weights in float16, without the training heads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    weights = torch.load(state_file, weights_only=True)["ema"]
    tensors = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in weights.items()
        if not name.startswith("aux.")
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {"config.json": config_of(Shape(), tokenizer), **settings_of(tokenizer)}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("/root/octavo-train"),
        help="train.py's folder with state.pt and tokenizer.json",
    )
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="output folder")
    args = parser.parse_args()
    export(args.dir / "state.pt", args.dir / "tokenizer.json", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
