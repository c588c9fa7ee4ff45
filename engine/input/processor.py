"""A request's input made ready: token ids, pixels, grids, positions, hashes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...scheduler.request import MediaSpan
from ..config import ModelConfig, PreprocessConfig
from .chat import ChatTemplate, MediaPart, check_text, read_messages
from .errors import InputError, shown
from .image import image_size, load_image, resize
from .media import MAX_ITEMS, MediaItem, MediaOptions, make_item
from .mrope import mrope_positions
from .room import TokenRoom
from .tokenizer import TextTokenizer
from .video import load_video


@dataclass(frozen=True, eq=False)
class ProcessedInput:
    """What a request is made of. `spans` and `media` are parallel, in prompt order."""

    prompt_token_ids: array[int]  # placeholders expanded
    spans: tuple[MediaSpan, ...]
    media: tuple[MediaItem, ...]
    mrope_positions: tuple[array[int], ...]  # three of the prompt's length
    mrope_position_delta: int


Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | ProcessedInput


class InputProcessor:
    """Makes requests' input ready. Thread-safe: it changes nothing once made."""

    def __init__(
        self,
        model_dir: Path,
        model_config: ModelConfig,
        preprocess: PreprocessConfig,
        max_model_len: int,
        allow_local_files: bool = True,
    ) -> None:
        self.config, self.preprocess = model_config, preprocess
        self.max_model_len, self.allow_local_files = max_model_len, allow_local_files
        self.tokenizer = TextTokenizer(model_dir)
        self._template = ChatTemplate(model_dir, self.tokenizer)
        self._pads = {
            model_config.image_token_id: "image",
            model_config.video_token_id: "video",
        }

    def from_prompt(
        self,
        prompt: Prompt,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ProcessedInput:
        """Any form of a prompt: messages, a raw text, or a dict with one of `messages`, `prompt`
        and `prompt_token_ids` and maybe `images` and `videos`. Raises `InputError`."""
        if isinstance(prompt, ProcessedInput):
            return prompt
        if isinstance(prompt, Mapping):
            return self._from_dict(prompt)
        if isinstance(prompt, str):
            return self.from_text(prompt, images, videos)
        return self.from_messages(prompt, images, videos)

    def _from_dict(self, prompt: Mapping[str, Any]) -> ProcessedInput:
        known = {"prompt", "prompt_token_ids", "messages", "images", "videos"}
        for name in prompt:
            if name not in known:
                raise InputError(name, f"{name}: unknown; a prompt has {', '.join(sorted(known))}")
        media = (prompt.get("images"), prompt.get("videos"))
        kinds = [name for name in ("prompt", "prompt_token_ids", "messages") if name in prompt]
        if len(kinds) != 1:
            raise InputError("prompt", "give one of prompt, prompt_token_ids and messages")
        if kinds == ["prompt"]:
            return self.from_text(prompt["prompt"], *media)
        if kinds == ["messages"]:
            return self.from_messages(prompt["messages"], *media)
        return self.from_token_ids(prompt["prompt_token_ids"], *media)

    def from_messages(
        self,
        messages: Any,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ProcessedInput:
        """A conversation, as the model card writes it. Raises `InputError`."""
        conversation = read_messages(messages)
        parts = _fill(conversation.media, {"image": images, "video": videos})
        self._check_text(sum(map(len, conversation.texts)))
        token_ids = self._template.encode(conversation)
        return self._finish(token_ids, parts)

    def from_text(
        self, text: Any, images: Sequence[Any] | None = None, videos: Sequence[Any] | None = None
    ) -> ProcessedInput:
        """A raw prompt, in which special tokens are parsed. Raises `InputError`."""
        if not check_text(text, "prompt"):
            raise InputError("prompt", "is empty")
        self._check_text(len(text))
        token_ids = self.tokenizer.encode_marked(text)
        return self._finish(token_ids, self._parts_of(token_ids, images, videos))

    def from_token_ids(
        self,
        token_ids: Any,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ProcessedInput:
        """Token ids, placeholders expanded or not. Raises `InputError`."""
        ids = self._check_token_ids(token_ids)
        return self._finish(ids, self._parts_of(ids, images, videos))

    def _check_text(self, size: int) -> None:
        """Refuses what cannot fit before it is encoded, which takes 240 bytes a character."""
        most = self.max_model_len * self.tokenizer.longest
        if size > most:
            raise InputError(
                "prompt",
                f"{size} characters are over max_model_len={self.max_model_len} tokens of at most "
                f"{self.tokenizer.longest} characters; shorten the text",
            )

    def _check_token_ids(self, token_ids: Any) -> list[int]:
        field = "prompt_token_ids"
        if not isinstance(token_ids, Sequence | array) or isinstance(token_ids, str | bytes):
            raise InputError(field, f"must be a list, not {type(token_ids).__name__}")
        if len(token_ids) == 0:
            raise InputError(field, "is empty")
        if len(token_ids) >= self.max_model_len:
            text = f"{len(token_ids)} of them, max_model_len is {self.max_model_len}"
            raise InputError(field, f"{text}; shorten the prompt, or raise max_model_len")
        for token in token_ids:
            whole = isinstance(token, int) and not isinstance(token, bool)
            if not whole or not 0 <= token < self.config.vocab_size:
                raise InputError(
                    field, f"{shown(token)}: must be whole numbers under {self.config.vocab_size}"
                )
        return list(token_ids)

    def _parts_of(
        self,
        token_ids: Sequence[int],
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
    ) -> list[MediaPart]:
        """A part for each run of placeholder tokens, with its media."""
        runs = [(kind, at) for kind, at, _ in self._runs(token_ids)]
        bare = [MediaPart(f"the placeholder at token {at}", kind, {}) for kind, at in runs]
        return _fill(bare, {"image": images, "video": videos})

    def _runs(self, token_ids: Sequence[int]) -> Iterator[tuple[str, int, int]]:
        """(kind, first, end) of each run of one placeholder token."""
        at = 0
        while at < len(token_ids):
            kind = self._pads.get(token_ids[at])
            end = at + 1
            if kind is not None:
                while end < len(token_ids) and token_ids[end] == token_ids[at]:
                    end += 1
                yield kind, at, end
            at = end

    def _finish(self, token_ids: Sequence[int], parts: Sequence[MediaPart]) -> ProcessedInput:
        if len(parts) > MAX_ITEMS:
            raise InputError("prompt", f"{len(parts)} images and videos; at most {MAX_ITEMS}")
        media = self._load_all(token_ids, parts)
        expanded, spans = self._expand(token_ids, media)
        positions, delta = mrope_positions(
            len(expanded), spans, self.config.vision.spatial_merge_size
        )
        self._check_positions(len(expanded) + delta)
        return ProcessedInput(expanded, spans, media, positions, delta)

    def _load_all(
        self, token_ids: Sequence[int], parts: Sequence[MediaPart]
    ) -> tuple[MediaItem, ...]:
        """The items of the parts, as long as there is room for them."""
        text = len(token_ids) - sum(end - at for _, at, end in self._runs(token_ids))
        factor = self.config.vision.resize_factor
        room = TokenRoom(self.max_model_len, text, len(parts), factor)
        return tuple(self._load(part, room) for part in parts)

    def _load(self, part: MediaPart, room: TokenRoom) -> MediaItem:
        vision = self.config.vision
        sizes = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        options = MediaOptions.from_part(part.part, part.kind, part.field)
        field = f"{part.field}.{part.kind}"
        if part.kind == "image":
            image = load_image(part.source, field, self.allow_local_files)
            size = image_size(
                image.height, image.width, options, self.preprocess, room.factor, field
            )
            room.take_image(*size, options, field)
            return make_item("image", resize(image, *size)[None], *sizes)
        clip = load_video(
            part.source, options, self.preprocess, room, field, self.allow_local_files
        )
        return make_item("video", clip.pixels, *sizes, clip.frame_indices, clip.sample_fps)

    def _expand(
        self, token_ids: Sequence[int], media: Sequence[MediaItem]
    ) -> tuple[array[int], tuple[MediaSpan, ...]]:
        """One pass: each placeholder becomes as many as its item has tokens."""
        expanded, spans = array("i"), []
        done = 0
        runs = list(self._runs(token_ids))
        if [kind for kind, _, _ in runs] != [item.kind for item in media]:
            raise InputError("prompt", f"{len(runs)} placeholders for {len(media)} items")
        for (_, at, end), item in zip(runs, media, strict=True):
            if end - at not in (1, item.num_tokens):
                raise InputError(
                    "prompt_token_ids",
                    f"{end - at} placeholders at {at} for an item of {item.num_tokens} tokens; "
                    "give one, or as many as it has",
                )
            expanded.extend(token_ids[done:at])
            spans.append(MediaSpan(len(expanded), item.num_tokens, item.grid_thw, item.media_hash))
            expanded.extend(array("i", (token_ids[at],)) * item.num_tokens)
            done = end
        expanded.extend(token_ids[done:])
        return expanded, tuple(spans)

    def _check_positions(self, end: int) -> None:
        """A position must be left for a token of output. `end`: the first after the prompt."""
        most = self.config.max_position_embeddings
        if end >= most:
            raise InputError(
                "prompt",
                f"reaches position {end - 1}, and the model has {most} positions; "
                "shorten the text, or take fewer frames",
            )


def _fill(parts: Sequence[MediaPart], given: Mapping[str, Sequence[Any] | None]) -> list[MediaPart]:
    """Gives each part without a source the next of the call's images or videos."""
    left = {}
    for kind, sources in given.items():
        if sources is not None and (
            isinstance(sources, str | bytes) or not isinstance(sources, Sequence)
        ):
            raise InputError(f"{kind}s", f"must be a list, not {type(sources).__name__}")
        left[kind] = iter(sources or ())
    filled = []
    for part in parts:
        if part.source is None:
            source = next(left[part.kind], None)
            if source is None:
                raise InputError(
                    part.field, f"needs {part.kind}s=[...]: a placeholder has no {part.kind}"
                )
            part = _with_source(part, source)
        filled.append(part)
    for kind, rest in left.items():
        count = sum(1 for _ in rest)
        if count:
            raise InputError(f"{kind}s", f"{count} more than the prompt has placeholders for")
    return filled


def _with_source(part: MediaPart, source: Any) -> MediaPart:
    """A source may bring options: a dict in the form of a message's part."""
    beside = source if isinstance(source, Mapping) else {part.kind: source}
    return MediaPart(part.field, part.kind, {**part.part, **beside})
