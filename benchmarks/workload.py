"""Workloads: seeded random requests in an engine-independent format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from octavo.engine.config.engine_config import ModelConfig
from octavo.engine.input.tokenizer import TextTokenizer

Size = tuple[int, int]  # width, height
Frames = tuple[Image.Image, ...]


@dataclass(frozen=True, eq=False)
class BenchRequest:
    """A request in a format that every engine accepts.

    In the token ids, one placeholder token stands for each image or video, in prompt order.
    """

    prompt_token_ids: tuple[int, ...]
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Frames, ...] = ()
    max_tokens: int = 64
    after: int | None = None  # index of the request that must finish first (the previous turn)

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt as accepted by `LLM.generate` and `Engine.add_request`."""
        media = {"images": list(self.images), "videos": [list(video) for video in self.videos]}
        given = {kind: items for kind, items in media.items() if items}
        return {"prompt_token_ids": list(self.prompt_token_ids), **given}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens used in random prompts."""

    plain: npt.NDArray[np.int64]  # ids of tokens that are not special
    vision_start: int
    vision_end: int
    image: int  # placeholder tokens
    video: int

    @classmethod
    def of(cls, model_dir: Path) -> Vocabulary:
        """Read a checkpoint's vocabulary. Raises `ConfigError` if its config is invalid."""
        config = ModelConfig.from_dir(model_dir)
        special = {*config.vision_token_ids, *TextTokenizer(model_dir).added.values()}
        return cls(
            np.array([token for token in range(config.vocab_size) if token not in special]),
            config.vision_start_token_id,
            config.vision_end_token_id,
            config.image_token_id,
            config.video_token_id,
        )

    def text(self, rng: np.random.Generator, length: int) -> list[int]:
        return rng.choice(self.plain, length).tolist()

    def item(self, placeholder: int) -> list[int]:
        """Return the tokens of one image or video in a prompt."""
        return [self.vision_start, placeholder, self.vision_end]


@dataclass(frozen=True)
class Media:
    """Sizes of the media of one prompt, in pixels."""

    images: tuple[Size, ...] = ()
    video: tuple[int, int, int] | None = None  # frames, width, height

    def draw(self, rng: np.random.Generator) -> tuple[tuple[Image.Image, ...], tuple[Frames, ...]]:
        """Return random images and videos of these sizes."""
        images = tuple(_picture(rng, *size) for size in self.images)
        if self.video is None:
            return images, ()
        frames, *size = self.video
        return images, (tuple(_picture(rng, *size) for _ in range(frames)),)

    def token_ids(self, vocabulary: Vocabulary) -> list[int]:
        placeholders = [vocabulary.image] * len(self.images)
        placeholders += [vocabulary.video] if self.video else []
        return [token for each in placeholders for token in vocabulary.item(each)]


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@dataclass(frozen=True)
class Workload:
    """Random conversations of `turns` requests each, determined by the seed.

    A first prompt is `shared_prefix_len` tokens common to all conversations, the media, and
    `input_len` tokens of its own. A later turn's prompt is the previous prompt, a random answer of
    `output_len` tokens, and `input_len` new tokens.
    """

    input_len: int = 128  # text tokens
    output_len: int = 64
    num_prompts: int = 16  # conversations
    media: Media = Media()
    share_media: bool = False  # all conversations use the same media
    shared_prefix_len: int = 0  # text tokens
    turns: int = 1
    seed: int = 0

    def requests(self, vocabulary: Vocabulary) -> list[BenchRequest]:
        """Return all requests; the turns of a conversation are adjacent."""
        rng = np.random.default_rng(self.seed)
        prefix = vocabulary.text(rng, self.shared_prefix_len)
        shared = self.media.draw(rng) if self.share_media else None
        made: list[BenchRequest] = []
        for _ in range(self.num_prompts):
            images, videos = shared or self.media.draw(rng)
            head = [*prefix, *self.media.token_ids(vocabulary)]
            first = len(made)
            for prompt in self._prompts(vocabulary, rng, head):
                after = len(made) - 1 if len(made) > first else None
                made.append(BenchRequest(tuple(prompt), images, videos, self.output_len, after))
        return made

    def _prompts(
        self, vocabulary: Vocabulary, rng: np.random.Generator, prompt: list[int]
    ) -> Iterator[list[int]]:
        """Yield the prompts of the turns of a conversation that starts with `prompt`."""
        for turn in range(self.turns):
            answer = vocabulary.text(rng, self.output_len) if turn else []
            prompt = [*prompt, *answer, *vocabulary.text(rng, self.input_len)]
            yield prompt

    def reseeded(self, number: int) -> Workload:
        """Return an equivalent workload with different tokens and pixels, to avoid cache hits."""
        return replace(self, seed=self.seed + number)
