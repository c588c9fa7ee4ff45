"""Read a prompt of any format: token ids with placeholders, and the media they stand for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...scheduler.params import truncated_repr
from ..config.engine_config import ModelConfig
from ..errors import InputError, TooLong
from ..media.options import MediaOptions
from ..tool_calling.schema import TOOL_FIELDS, tools_of
from .chat_template import ChatTemplate, MediaPart, check_text, read_messages
from .tokenizer import TextBudget, TextTokenizer

PLACEHOLDER = "a placeholder"  # field name in errors about media of a raw prompt


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """Token ids of a prompt. `parts` are the media of its placeholder runs, in order."""

    token_ids: Sequence[int]
    parts: list[MediaPart]


class PromptReader:
    """Reads and tokenizes prompts. Immutable, hence thread-safe."""

    def __init__(self, model_dir: Path, config: ModelConfig, max_model_len: int) -> None:
        self.config, self.max_model_len = config, max_model_len
        self.tokenizer = TextTokenizer(model_dir)
        self._template = ChatTemplate(model_dir, self.tokenizer)
        self._pads = {config.image_token_id: "image", config.video_token_id: "video"}

    def read(
        self,
        prompt: Any,
        images: Any = None,
        videos: Any = None,
        check: Callable[[], None] = lambda: None,
    ) -> ReadPrompt:
        """Read messages, a raw text or a dict. Raises `InputError`.

        A dict has one of `messages`, `prompt` and `prompt_token_ids`, and optionally `images` and
        `videos`. `check` is called between pieces of text and raises once the request has ended.
        """
        budget = TextBudget(self.max_model_len, check)
        if isinstance(prompt, Mapping):
            return self._from_dict(prompt, budget)
        if isinstance(prompt, str):
            return self.from_text(prompt, images, videos, budget)
        return self.from_messages(prompt, images, videos, budget=budget)

    def _from_dict(self, prompt: Mapping[str, Any], budget: TextBudget) -> ReadPrompt:
        known = {"prompt", "prompt_token_ids", "messages", "images", "videos", *TOOL_FIELDS}
        for name in prompt:
            if name not in known:
                text = f"{name}: unknown; allowed are {', '.join(sorted(known))}"
                raise InputError(name, text)
        media = (prompt.get("images"), prompt.get("videos"))
        kinds = [name for name in ("prompt", "prompt_token_ids", "messages") if name in prompt]
        if len(kinds) != 1:
            raise InputError("prompt", "pass exactly one of prompt, prompt_token_ids and messages")
        if kinds == ["messages"]:
            tools = tools_of(prompt)
            return self.from_messages(prompt["messages"], *media, tools=tools, budget=budget)
        for name in TOOL_FIELDS:
            if prompt.get(name):
                raise InputError(name, "is only allowed with messages")
        if kinds == ["prompt"]:
            return self.from_text(prompt["prompt"], *media, budget)
        return self.from_token_ids(prompt["prompt_token_ids"], *media)

    def from_messages(
        self,
        messages: Any,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        tools: Any = None,
        budget: TextBudget | None = None,
    ) -> ReadPrompt:
        """Read a conversation in the model card's format, with OpenAI `tools`.

        Raises `InputError`.
        """
        conversation = read_messages(messages, tools)
        parts = _fill(conversation.media, {"image": images, "video": videos})
        self._check_text(sum(map(len, conversation.texts)))
        budget = budget or TextBudget(self.max_model_len)
        return ReadPrompt(self._template.encode(conversation, budget), parts)

    def from_text(
        self,
        text: Any,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        budget: TextBudget | None = None,
    ) -> ReadPrompt:
        """Read a raw prompt, in which special tokens are parsed. Raises `InputError`."""
        if not self._checked(text, "prompt"):
            raise InputError("prompt", "is empty")
        budget = budget or TextBudget(self.max_model_len)
        token_ids = self.tokenizer.encode_marked(text, budget)
        return ReadPrompt(token_ids, self._parts_of(token_ids, images, videos))

    def tokenize(
        self, text: str, plain: bool, check: Callable[[], None] = lambda: None
    ) -> list[int]:
        """Return a text's token ids, at most `max_model_len`.

        `plain`: encode the spelling of added tokens as ordinary text. `check`: as in `read`.
        Raises `InputError`.
        """
        encode = self.tokenizer.encode_plain if plain else self.tokenizer.encode_marked
        return encode(self._checked(text, "text"), TextBudget(self.max_model_len, check))

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids. Raises `InputError` for invalid ids."""
        ids = self._check_token_ids(token_ids, self.max_model_len)
        return self.tokenizer.decode(ids, skip_special_tokens)

    def from_token_ids(
        self,
        token_ids: Any,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ReadPrompt:
        """Read token ids, with placeholders expanded or not. Raises `InputError`."""
        ids = self._check_token_ids(token_ids, self.max_model_len - 1)
        return ReadPrompt(ids, self._parts_of(ids, images, videos))

    def _checked(self, text: Any, field: str) -> str:
        """Return a valid text that may fit. Its size is checked first, in constant time."""
        if isinstance(text, str):
            self._check_text(len(text))
        return check_text(text, field)

    def _check_text(self, size: int) -> None:
        """Reject text that cannot fit before any of it is encoded."""
        most = self.max_model_len * self.tokenizer.longest
        if size > most:
            raise TooLong(
                "prompt",
                f"{size} characters exceed max_model_len={self.max_model_len} tokens of at most "
                f"{self.tokenizer.longest} characters; shorten the text",
            )

    def _check_token_ids(self, token_ids: Any, most: int) -> list[int]:
        field = "prompt_token_ids"
        if not isinstance(token_ids, Sequence | array) or isinstance(token_ids, str | bytes):
            raise InputError(field, f"must be a list, not {type(token_ids).__name__}")
        if len(token_ids) == 0:
            raise InputError(field, "is empty")
        if len(token_ids) > most:
            text = f"has {len(token_ids)} ids, max_model_len is {self.max_model_len}"
            raise TooLong(field, f"{text}; pass at most {most}, or raise max_model_len")
        for token in token_ids:
            is_int = isinstance(token, int) and not isinstance(token, bool)
            if not is_int or not 0 <= token < self.config.vocab_size:
                raise InputError(
                    field,
                    f"{truncated_repr(token)}: must be integers from 0 to "
                    f"{self.config.vocab_size - 1}",
                )
        return list(token_ids)

    def _parts_of(
        self,
        token_ids: Sequence[int],
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
    ) -> list[MediaPart]:
        """Return a part with its media for each run of placeholder tokens."""
        runs = [(kind, at) for kind, at, _ in self.runs(token_ids)]
        bare = [MediaPart(f"{PLACEHOLDER} at token {at}", kind, {}) for kind, at in runs]
        return _fill(bare, {"image": images, "video": videos})

    def runs(self, token_ids: Sequence[int]) -> Iterator[tuple[str, int, int]]:
        """Yield (kind, first index, end) of each run of the same placeholder token."""
        at = 0
        while at < len(token_ids):
            kind = self._pads.get(token_ids[at])
            end = at + 1
            if kind is not None:
                while end < len(token_ids) and token_ids[end] == token_ids[at]:
                    end += 1
                yield kind, at, end
            at = end


def _fill(parts: Sequence[MediaPart], given: Mapping[str, Sequence[Any] | None]) -> list[MediaPart]:
    """Assign the next of `images` or `videos` to each part without a source."""
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
                # Raise a better error if the source's key is misspelt.
                MediaOptions.from_part(part.part, part.kind, part.field)
                raise InputError(
                    part.field, f"has no {part.kind} source; pass it in {part.kind}s=[...]"
                )
            part = _with_source(part, source)
        filled.append(part)
    for kind, rest in left.items():
        count = sum(1 for _ in rest)
        if count:
            raise InputError(
                f"{kind}s", f"{count} more than placeholders in the prompt; remove them"
            )
    return filled


def _with_source(part: MediaPart, source: Any) -> MediaPart:
    """Add a source to a part. A dict in the format of a message part also adds options."""
    added = source if isinstance(source, Mapping) else {part.kind: source}
    return MediaPart(part.field, part.kind, {**part.part, **added})
