"""Read a prompt of any format: token ids with placeholders, and the media they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...scheduler.params import truncated_repr
from ..config.engine_config import ModelConfig
from ..errors import InputError, TooLong
from ..media.options import MediaOptions
from .chat_template import ChatTemplate
from .conversation import Conversation, MediaPart, check_text
from .parsed_prompt import ParsedPrompt
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

    def read(self, prompt: Any, check: Callable[[], None] = lambda: None) -> ReadPrompt:
        """Read a prompt in any format of `ParsedPrompt.of`. Raises `InputError`.

        `check` is called between pieces of text and raises once the request has ended. Special
        tokens are parsed in raw prompts only.
        """
        prompt = ParsedPrompt.of(prompt)
        body, given = prompt.body, {"image": prompt.images, "video": prompt.videos}
        if isinstance(body, Conversation):
            parts = _fill(body.media, given)
            return ReadPrompt(self.encode(body, check), parts)
        if isinstance(body, str):
            if not self._checked(body, "prompt"):
                raise InputError("prompt", "is empty")
            budget = TextBudget(self.max_model_len, check)
            token_ids = self.tokenizer.encode_marked(body, budget)
        else:
            token_ids = self._check_token_ids(body, self.max_model_len - 1)
        runs = [(kind, at) for kind, at, _ in self.runs(token_ids)]
        bare = [MediaPart(f"{PLACEHOLDER} at token {at}", kind, {}) for kind, at in runs]
        return ReadPrompt(token_ids, _fill(bare, given))

    def encode(
        self, conversation: Conversation, check: Callable[[], None] = lambda: None
    ) -> list[int]:
        """Return token ids with one placeholder for each image or video. Raises `InputError`."""
        self._check_text(sum(map(len, conversation.texts)))
        return self._template.encode(conversation, TextBudget(self.max_model_len, check))

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

    def _check_token_ids(self, token_ids: Sequence[int], most: int) -> list[int]:
        field = "prompt_token_ids"
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


def _fill(parts: Sequence[MediaPart], given: Mapping[str, Sequence[Any]]) -> list[MediaPart]:
    """Assign the next of `images` or `videos` to each part without a source."""
    left = {kind: iter(sources) for kind, sources in given.items()}
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
