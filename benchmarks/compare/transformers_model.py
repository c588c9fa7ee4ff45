"""Reference implementation: transformers' Qwen2-VL with Octavo's pixels and positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.input.processor import InputProcessor, ProcessedInput
from octavo.engine.media.item import MediaItem
from octavo.kernels.patches import cut_patches_ref


class TransformersModel:
    """`Qwen2VLForConditionalGeneration` with greedy decoding in float32, without a KV cache."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2VLForConditionalGeneration

        self.config = ModelConfig.from_dir(folder)
        self.preprocess = PreprocessConfig.from_dir(folder)
        self.processor = InputProcessor(folder, self.config, self.preprocess, 4096)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    def answer(self, messages: list[dict[str, Any]], max_tokens: int) -> str:
        tokens = self.generate(self.processor.from_prompt(messages), max_tokens)
        return self.processor.tokenizer.backend.decode(tokens)

    @torch.inference_mode()
    def generate(self, ready: ProcessedInput, max_tokens: int) -> list[int]:
        """Return greedy token ids up to and including <|im_end|>; vision tokens are masked."""
        ids = list(ready.prompt_token_ids)
        positions = torch.tensor([list(axis) for axis in ready.mrope_positions])
        end = self.processor.tokenizer.added["<|im_end|>"]
        media = self._media(ready)
        for step in range(max_tokens):
            after = torch.arange(len(ready.prompt_token_ids), len(ids)) + ready.mrope_position_delta
            whole = torch.cat((positions, after.expand(3, -1)), dim=1)
            logits = self.model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                position_ids=whole[:, None],
                mm_token_type_ids=self._types(ids),
                use_cache=False,
                **media,
            ).logits[0, -1]
            logits[list(self.config.vision_token_ids)] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == end:
                break
            assert step < max_tokens
        return ids[len(ready.prompt_token_ids) :]

    def _types(self, ids: list[int]) -> torch.Tensor:
        kinds = {self.config.image_token_id: 1, self.config.video_token_id: 2}
        return torch.tensor([[kinds.get(token, 0) for token in ids]])

    def _media(self, ready: ProcessedInput) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        vision = self.config.vision
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            items = [pair for pair in _pixels(ready) if pair[0].kind == kind]
            if not items:
                continue
            patches = [
                cut_patches_ref(
                    torch.from_numpy(pixels),
                    self.preprocess.image_mean,
                    self.preprocess.image_std,
                    vision.patch_size,
                    vision.temporal_patch_size,
                    vision.spatial_merge_size,
                    torch.float32,
                )
                for _, pixels in items
            ]
            found[name] = torch.cat(patches)
            found[f"{kind}_grid_thw"] = torch.tensor([item.grid_thw for item, _ in items])
        return found


def _pixels(ready: ProcessedInput) -> Iterator[tuple[MediaItem, npt.NDArray[np.uint8]]]:
    """Yield each media item with the concatenated pixels of its units."""
    units = iter(ready.units)
    for item in ready.media:
        parts = [next(units)]
        while sum(part.grid_thw[0] for part in parts) < item.grid_thw[0]:
            parts.append(next(units))
        yield item, np.concatenate([part.pixels for part in parts])
