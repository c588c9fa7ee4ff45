"""Input preprocessing: token ids, pixels, grids, positions and media hashes of a request."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ...scheduler.request import MediaSpan
from ..config.engine_config import ModelConfig, PreprocessConfig
from ..config.media_limits import MediaLimits
from ..errors import InputError, TooLong
from ..media.embeds import MediaEmbeds
from ..media.encode_units import OpenItem, UnitStream
from ..media.item import MediaItem, PatchShape, UnitContent
from ..media.loader import MediaLoader
from ..media.options import MediaOptions
from ..media.source import BYTES, MediaAccess
from ..media.task import MediaTask
from ..media.token_budget import MediaTokenBudget
from ..structured_output.compiler import Grammar
from ..tool_calling.tool_choice import ToolUse
from .conversation import MediaPart
from .mrope import mrope_positions
from .parsed_prompt import NO_TOOLS, ParsedPrompt
from .prompt import PromptReader


@dataclass(frozen=True)
class InputTimes:
    """Duration of preprocessing in seconds, until the request could start."""

    queued_s: float  # wait for a thread
    spent_s: float  # preprocessing


@dataclass(frozen=True, eq=False)
class ProcessedInput:
    """Preprocessed input of a request. `spans` and `media` are parallel, in prompt order.

    `stream` yields units that are still being decoded; it can serve only one request.
    """

    prompt_token_ids: array[int]  # with expanded placeholders
    spans: tuple[MediaSpan, ...]
    media: tuple[MediaItem, ...]
    mrope_positions: tuple[array[int], ...]  # [3][prompt length]
    mrope_position_delta: int
    units: tuple[UnitContent, ...] = ()  # units decoded so far, in prompt order
    stream: UnitStream | None = None  # decodes the remaining units in the caller's thread
    times: InputTimes | None = None
    arrived_at: float | None = None  # monotonic time at which the job was submitted
    grammar: Grammar | None = None  # of structured output, compiled in the pool
    bad_words: tuple[tuple[int, ...], ...] | None = None  # token ids, encoded in the pool
    tools: ClassVar[ToolUse] = NO_TOOLS  # read before preprocessing


Parsed = ParsedPrompt | ProcessedInput
Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Parsed


def parse(prompt: Prompt) -> Parsed:
    """Check the structure of a prompt that is not parsed yet. Raises `InputError`."""
    return prompt if isinstance(prompt, ProcessedInput) else ParsedPrompt.of(prompt)


class InputProcessor:
    """Preprocesses prompts. Immutable, hence thread-safe."""

    def __init__(
        self,
        model_dir: Path,
        model_config: ModelConfig,
        preprocess: PreprocessConfig,
        max_model_len: int,
        max_unit_temporal_patches: int = 4,
        access: MediaAccess | None = None,
        limits: MediaLimits | None = None,
        defaults: Mapping[str, MediaOptions] | None = None,
    ) -> None:
        """Load the tokenizer and the chat template.

        `access`: allowed media sources, by default all local files and no URLs. `defaults`: media
        options by kind ("image", "video"), which an item's own options override.
        """
        vision = model_config.vision
        self.config, self.max_model_len = model_config, max_model_len
        self.limits = limits or MediaLimits()
        self.defaults = defaults or {"image": MediaOptions(), "video": MediaOptions()}
        self.reader = PromptReader(model_dir, model_config, max_model_len)
        self.tokenizer = self.reader.tokenizer
        self.shape = PatchShape(
            vision.patch_size,
            vision.temporal_patch_size,
            vision.spatial_merge_size,
            max_unit_temporal_patches,
            vision.hidden_size,
        )
        self.loader = MediaLoader(preprocess, self.shape, access or MediaAccess(), self.limits)

    def from_prompt(
        self,
        prompt: Prompt,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ProcessedInput:
        """Preprocess a prompt completely. Raises `InputError`.

        `prompt`: messages, a raw text, or a dict with one of `messages`, `prompt` and
        `prompt_token_ids`, and optionally `images` and `videos`.
        """
        if isinstance(prompt, ProcessedInput):
            return prompt
        ready = self.begin(prompt, images, videos)
        if ready.stream is None:
            return ready
        rest = ready.stream.finish()
        return replace(ready, units=(*ready.units, *rest), stream=None)

    def begin(
        self,
        prompt: Prompt,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        task: MediaTask | None = None,
    ) -> ProcessedInput:
        """Preprocess a prompt except for later frames of videos.

        Those are left to `stream` of the result, on which the caller must call `run` or `cancel`.
        `task`: deadline and cancellation. Raises `InputError`.
        """
        if isinstance(prompt, ProcessedInput):
            return prompt
        task = task or MediaTask(self.limits)
        with ExitStack() as on_failure:
            on_failure.callback(task.close)
            found = self.reader.read(ParsedPrompt.of(prompt, images, videos), task.check)
            opened = self._open_all(found.token_ids, found.parts, task)
            media = tuple(each.item for each in opened)
            expanded, spans = self._expand(found.token_ids, media)
            positions, delta = mrope_positions(len(expanded), spans, self.shape.merge_size)
            self._check_positions(len(expanded) + delta)
            on_failure.pop_all()
        units = self.loader.units(opened, task)  # the iterator closes the task
        count = self._num_at_once(media)
        first = tuple(itertools.islice(units, count))
        rest = None if count is None else UnitStream(units)
        return ProcessedInput(expanded, spans, media, positions, delta, first, rest)

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each word, both alone and after a space if they differ."""
        texts = [text for word in words for text in (word, f" {word.lstrip()}")]
        found = dict.fromkeys(tuple(self.tokenizer.encode_plain(text)) for text in texts)
        return tuple(ids for ids in found if ids and max(ids) < self.config.vocab_size)

    def _open_all(
        self,
        token_ids: Sequence[int],
        parts: Sequence[MediaPart],
        task: MediaTask,
    ) -> list[OpenItem]:
        """Open the media of all parts. Raises `InputError` if they exceed the token budget."""
        if len(parts) > self.limits.max_media_items:
            self.limits.refuse("max_media_items", "prompt", f"{len(parts)} images and videos")
        text = len(token_ids) - sum(end - at for _, at, end in self.reader.runs(token_ids))
        budget = MediaTokenBudget(self.max_model_len, text, len(parts), self.shape.factor)
        opened = []
        for part in parts:
            options, place = self._options(part), part.place
            opened.append(self.loader.open(part.kind, part.source, options, budget, place, task))
        return opened

    def _options(self, part: MediaPart) -> MediaOptions:
        """Return the item's options, completed by the defaults that apply to its source."""
        own = MediaOptions.from_part(part.part, part.kind, part.field)
        own.check_size(self.shape.factor, part.field)
        if isinstance(part.source, MediaEmbeds):
            return own
        defaults = self.defaults[part.kind]
        is_file = isinstance(part.source, BYTES | os.PathLike)
        return own.over(defaults.of_files() if is_file else defaults.of_lists())

    def _num_at_once(self, media: Sequence[MediaItem]) -> int | None:
        """Return the number of units to decode before the request can start; None: all.

        These are the units up to the first one of the first video that has several.
        """
        for index, item in enumerate(media):
            if item.grid_thw[0] > self.shape.max_unit_temporal_patches:
                return index + 1
        return None

    def _expand(
        self, token_ids: Sequence[int], media: Sequence[MediaItem]
    ) -> tuple[array[int], tuple[MediaSpan, ...]]:
        """Repeat each placeholder as often as its item has tokens."""
        expanded, spans = array("i"), []
        done = 0
        runs = list(self.reader.runs(token_ids))
        if [kind for kind, _, _ in runs] != [item.kind for item in media]:
            raise InputError(
                "prompt",
                f"{len(runs)} placeholders for {len(media)} images and videos; use one for each",
            )
        for (_, at, end), item in zip(runs, media, strict=True):
            if end - at not in (1, item.num_tokens):
                raise InputError(
                    "prompt_token_ids",
                    f"{end - at} placeholders at {at} for an item of {item.num_tokens} tokens; "
                    "pass one, or one per token",
                )
            expanded.extend(token_ids[done:at])
            spans.append(MediaSpan(len(expanded), item.num_tokens, item.grid_thw))
            expanded.extend(array("i", (token_ids[at],)) * item.num_tokens)
            done = end
        expanded.extend(token_ids[done:])
        return expanded, tuple(spans)

    def _check_positions(self, end: int) -> None:
        """Raise `TooLong` unless a position is left for output. `end`: the first free position."""
        most = self.config.max_position_embeddings
        if end >= most:
            raise TooLong(
                "prompt",
                f"reaches position {end - 1}, but the model has {most} positions; "
                "shorten the text, or use fewer frames",
            )
