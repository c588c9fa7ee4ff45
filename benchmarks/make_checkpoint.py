"""Write a random checkpoint with the shape of a real Qwen2-VL, to measure speed and memory.

    python -m octavo.benchmarks.make_checkpoint --config 2b DIR

The outputs are meaningless. The tokenizer is the tiny checkpoint's: bytes and Qwen's special
tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file

from .fakes.tiny_checkpoint import checkpoint_shapes, tiny_config
from .fakes.tiny_tokenizer import write_json, write_settings, write_tokenizer

SHARD_BYTES = 4 << 30
# layers, heads, KV heads, MLP width, vocabulary, tied head
DECODERS = {
    "2b": (28, 12, 2, 8960, 151936, True),
    "7b": (28, 28, 4, 18944, 152064, False),
    "72b": (80, 64, 8, 29568, 152064, False),
}


def real_config(name: str) -> dict[str, Any]:
    """Return config.json with a real model's shape and the tiny tokenizer's token ids."""
    layers, heads, kv_heads, inner, vocab_size, tied = DECODERS[name]
    config = tiny_config(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        vision_layers=32,
        vision_heads=16,
        vision_head_dim=80,
        tied=tied,
        dtype="bfloat16",
        vocab_size=vocab_size,
        max_position_embeddings=32768,
    )
    vision = config["vision_config"] | {"mlp_ratio": 4}
    return config | {"intermediate_size": inner, "vision_config": vision}


def shards(config: dict[str, Any]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Group the tensors' names and shapes into files of at most SHARD_BYTES."""
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in checkpoint_shapes(config):
        nbytes = 2 * math.prod(shape)
        if files[-1] and size + nbytes > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append((name, shape))
        size += nbytes
    return files


def _tensors(shapes: list[tuple[str, tuple[int, ...]]], pool: torch.Tensor) -> Iterator[Any]:
    """Yield random tensors that repeat one pool of numbers: sampling billions takes minutes."""
    for name, shape in shapes:
        count = math.prod(shape)
        numbers = pool.repeat(-(-count // len(pool)))[:count].view(shape)
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        yield name, torch.ones(shape).bfloat16() if "norm" in name else numbers * scale


def make_checkpoint(folder: Path, name: str) -> Path:
    """Write a checkpoint of shape `name` ("2b", "7b", "72b"; 4.4, 16.6 and 147 GB)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = real_config(name)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    files = shards(config)
    weight_map: dict[str, str] = {}
    for index, shapes in enumerate(track(files, description=f"writing {folder}"), 1):
        file = f"model-{index:05}-of-{len(files):05}.safetensors"
        save_file(dict(_tensors(shapes, pool)), folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys((tensor for tensor, _ in shapes), file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    write_tokenizer(folder)
    write_settings(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--config", choices=list(DECODERS), default="2b", help="model size")
    args = parser.parse_args()
    make_checkpoint(args.folder, args.config)
    print(json.dumps({"folder": str(args.folder), "config": args.config}))


if __name__ == "__main__":
    main()
