"""The tokens that a prompt's images and videos may take.

Asked before pixels are made, so that no request makes more of them than the model could read,
whatever its options say.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TooLong
from .options import MediaOptions


@dataclass
class MediaTokenBudget:
    """Starts with all of `max_model_len` that text and one token of output leave."""

    max_model_len: int
    num_text_tokens: int
    num_items: int
    factor: int  # pixels of a token's side
    taken: int = 0

    def __post_init__(self) -> None:
        if self.total < 0:
            raise TooLong(
                "prompt",
                f"{self.num_text_tokens} tokens of text, over max_model_len={self.max_model_len}; "
                "shorten the text, or raise max_model_len",
            )

    @property
    def total(self) -> int:
        return self.max_model_len - 1 - self.num_text_tokens

    @property
    def share(self) -> int:
        """What each item has if all have as much."""
        return self.total // self.num_items

    def take_image(self, height: int, width: int, options: MediaOptions, field: str) -> None:
        """Raises `TooLong` when an image of that size does not fit beside what is there."""
        pixels = self.share * self.factor**2
        self._take(height, width, 1, field, self._advice("image", pixels, options))

    def take_video(
        self, height: int, width: int, num_frames: int, options: MediaOptions, field: str
    ) -> None:
        """The same for a video of an even number of frames."""
        pixels = self.share * self.factor**2 * 2 // num_frames
        if pixels < 4 * self.factor**2:
            most = max(2, self.share // 4 * 2)
            advice = f"at most {most} frames (fewer of a list, or a lower fps, nframes, max_frames)"
        else:
            advice = self._advice("video", pixels, options)
        self._take(height, width, num_frames // 2, field, advice)

    def take_embeds(self, num_tokens: int, field: str) -> None:
        """The same for an item that comes as embeddings."""
        left = self.total - self.taken
        if num_tokens > left:
            raise TooLong(
                field,
                f"{num_tokens} tokens of embeddings, and {left} are left of "
                f"max_model_len={self.max_model_len}; make them of fewer pixels, or raise "
                "max_model_len",
            )
        self.taken += num_tokens

    def _take(self, height: int, width: int, depth: int, field: str, advice: str) -> None:
        num_tokens = height * width // self.factor**2 * depth
        left = self.total - self.taken
        if num_tokens > left:
            raise TooLong(
                field,
                f"{width}×{height} pixels{f' a frame, {2 * depth} frames' if depth > 1 else ''} "
                f"are {num_tokens} tokens, and {left} are left of "
                f"max_model_len={self.max_model_len}; {advice} would fit, or raise max_model_len",
            )
        self.taken += num_tokens

    def _advice(self, kind: str, pixels: int, options: MediaOptions) -> str:
        """Settings under which every item gets its share: those that bind are named.

        The resize rule may pass max_pixels to reach min_pixels, which is large for videos."""
        if options.resized_height:
            return f"resized_height × resized_width of at most {pixels} for each {kind}"
        if kind == "video" or options.min_pixels:
            return f"min_pixels={self.factor**2} and max_pixels={pixels} for each {kind}"
        return f"max_pixels={pixels} for each {kind}"
