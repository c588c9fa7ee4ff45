"""Token budget of a prompt's images and videos.

It is checked before decoding, so that no request decodes more pixels than the model can process.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TooLong
from .options import MediaOptions


@dataclass
class MediaTokenBudget:
    """Tokens of `max_model_len` that remain after the text and one output token."""

    max_model_len: int
    num_text_tokens: int
    num_items: int
    factor: int  # side of a token, pixels
    taken: int = 0

    def __post_init__(self) -> None:
        if self.total < 0:
            raise TooLong(
                "prompt",
                f"{self.num_text_tokens} tokens of text exceed max_model_len={self.max_model_len}; "
                "shorten the text, or raise max_model_len",
            )

    @property
    def total(self) -> int:
        return self.max_model_len - 1 - self.num_text_tokens

    @property
    def share(self) -> int:
        """Tokens for each item if all items get the same number."""
        return self.total // self.num_items

    def take_image(self, height: int, width: int, options: MediaOptions, field: str) -> None:
        """Reserve the tokens of an image. Raises `TooLong` if they exceed the remaining budget."""
        pixels = self.share * self.factor**2
        self._take(height, width, 1, field, self._advice("image", pixels, options))

    def take_video(
        self, height: int, width: int, num_frames: int, options: MediaOptions, field: str
    ) -> None:
        """Reserve the tokens of a video with an even number of frames. Raises `TooLong`."""
        pixels = self.share * self.factor**2 * 2 // num_frames
        if pixels < 4 * self.factor**2:
            most = max(2, self.share // 4 * 2)
            advice = f"at most {most} frames (a shorter list, or lower fps, nframes, max_frames)"
        else:
            advice = self._advice("video", pixels, options)
        self._take(height, width, num_frames // 2, field, advice)

    def take_embeds(self, num_tokens: int, field: str) -> None:
        """Reserve the tokens of an item that is given as embeddings. Raises `TooLong`."""
        left = self.total - self.taken
        if num_tokens > left:
            raise TooLong(
                field,
                f"{num_tokens} tokens of embeddings exceed the {left} left of "
                f"max_model_len={self.max_model_len}; compute them from fewer pixels, or raise "
                "max_model_len",
            )
        self.taken += num_tokens

    def _take(self, height: int, width: int, depth: int, field: str, advice: str) -> None:
        num_tokens = height * width // self.factor**2 * depth
        left = self.total - self.taken
        if num_tokens > left:
            raise TooLong(
                field,
                f"{width}×{height} pixels{f' per frame, {2 * depth} frames' if depth > 1 else ''} "
                f"are {num_tokens} tokens, but only {left} are left of "
                f"max_model_len={self.max_model_len}; {advice} would fit, or raise max_model_len",
            )
        self.taken += num_tokens

    def _advice(self, kind: str, pixels: int, options: MediaOptions) -> str:
        """Return the options to set so that every item stays within its share.

        min_pixels is included for videos: resizing may exceed max_pixels to reach it.
        """
        if options.resized_height:
            return f"resized_height × resized_width of at most {pixels} for each {kind}"
        if kind == "video" or options.min_pixels:
            return f"min_pixels={self.factor**2} and max_pixels={pixels} for each {kind}"
        return f"max_pixels={pixels} for each {kind}"
