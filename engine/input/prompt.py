"""Any form of a prompt read: token ids with placeholders, and the media that they stand for."""

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

PLACEHOLDER = "a placeholder"  # in a raw prompt: where errors say that something is wrong


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """`parts` has the media of each run of placeholder tokens, in order."""

    token_ids: Sequence[int]
    parts: list[MediaPart]


class PromptReader:
    """Thread-safe: it changes nothing once made."""

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
        """Read messages, a raw text, or a dict with one of `messages`, `prompt` and
        `prompt_token_ids` and maybe `images` and `videos`.

        `check`: called between pieces of text; raises once the request has ended. Raises
        `InputError`.
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
                raise InputError(name, f"{name}: unknown; a prompt has {', '.join(sorted(known))}")
        media = (prompt.get("images"), prompt.get("videos"))
        kinds = [name for name in ("prompt", "prompt_token_ids", "messages") if name in prompt]
        if len(kinds) != 1:
            raise InputError("prompt", "give one of prompt, prompt_token_ids and messages")
        if kinds == ["messages"]:
            tools = tools_of(prompt)
            return self.from_messages(prompt["messages"], *media, tools=tools, budget=budget)
        for name in TOOL_FIELDS:
            if prompt.get(name):
                raise InputError(name, "goes with messages alone")
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
        """Read a conversation, as the model card writes it; OpenAI's `tools`. Raises
        `InputError`."""
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

        `plain`: an added token's spelling means nothing. `check`: as in `read`. Raises
        `InputError`.
        """
        encode = self.tokenizer.encode_plain if plain else self.tokenizer.encode_marked
        return encode(self._checked(text, "text"), TextBudget(self.max_model_len, check))

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids. Raises `InputError` for ids that the model does not
        have."""
        ids = self._check_token_ids(token_ids, self.max_model_len)
        return self.tokenizer.decode(ids, skip_special_tokens)

    def from_token_ids(
        self,
        token_ids: Any,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> ReadPrompt:
        """Token ids, placeholders expanded or not. Raises `InputError`."""
        ids = self._check_token_ids(token_ids, self.max_model_len - 1)
        return ReadPrompt(ids, self._parts_of(ids, images, videos))

    def _checked(self, text: Any, field: str) -> str:
        """Return the text if it may fit. Its size is checked first: that takes no time."""
        if isinstance(text, str):
            self._check_text(len(text))
        return check_text(text, field)

    def _check_text(self, size: int) -> None:
        """Reject text that cannot fit before any of it is encoded."""
        most = self.max_model_len * self.tokenizer.longest
        if size > most:
            raise TooLong(
                "prompt",
                f"{size} characters are over max_model_len={self.max_model_len} tokens of at most "
                f"{self.tokenizer.longest} characters; shorten the text",
            )

    def _check_token_ids(self, token_ids: Any, most: int) -> list[int]:
        field = "prompt_token_ids"
        if not isinstance(token_ids, Sequence | array) or isinstance(token_ids, str | bytes):
            raise InputError(field, f"must be a list, not {type(token_ids).__name__}")
        if len(token_ids) == 0:
            raise InputError(field, "is empty")
        if len(token_ids) > most:
            text = f"{len(token_ids)} of them, max_model_len is {self.max_model_len}"
            raise TooLong(field, f"{text}; give at most {most}, or raise max_model_len")
        for token in token_ids:
            whole = isinstance(token, int) and not isinstance(token, bool)
            if not whole or not 0 <= token < self.config.vocab_size:
                raise InputError(
                    field,
                    f"{truncated_repr(token)}: must be integers below {self.config.vocab_size}",
                )
        return list(token_ids)

    def _parts_of(
        self,
        token_ids: Sequence[int],
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
    ) -> list[MediaPart]:
        """A part for each run of placeholder tokens, with its media."""
        runs = [(kind, at) for kind, at, _ in self.runs(token_ids)]
        bare = [MediaPart(f"{PLACEHOLDER} at token {at}", kind, {}) for kind, at in runs]
        return _fill(bare, {"image": images, "video": videos})

    def runs(self, token_ids: Sequence[int]) -> Iterator[tuple[str, int, int]]:
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
                MediaOptions.from_part(part.part, part.kind, part.field)  # a misspelt source's key
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
