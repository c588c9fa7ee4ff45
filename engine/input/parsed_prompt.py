"""A prompt in the form that all APIs build once, before it is preprocessed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from sys import getsizeof
from typing import Any

from ..errors import InputError
from ..tool_calling.schema import TOOL_FIELDS
from ..tool_calling.tool_choice import ToolUse
from ..utils.readers import MAX_AT_ONCE
from .conversation import Conversation, read_conversation

BYTES = (str, bytes, bytearray, memoryview)
MAX_SOURCES = 1 << 14  # including the frames of lists; a larger request is rejected later
TOKEN_ID_BYTES = 40  # bytes per item of a list of ints
LONG_TEXT = 1 << 16  # characters; tokenizing them takes some tenths of a second of one core
BODIES = ("prompt", "prompt_token_ids", "messages")
MEDIA_FIELDS = ("images", "videos")
NO_TOOLS = ToolUse()


@dataclass(frozen=True, eq=False)
class ParsedPrompt:
    """A prompt whose structure is valid. Preprocessing checks its texts, token ids and media."""

    body: Conversation | str | Sequence[int]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    tools: ToolUse = NO_TOOLS

    @classmethod
    def of(
        cls, prompt: Any, images: Any = None, videos: Any = None, from_json: bool = False
    ) -> ParsedPrompt:
        """Parse messages, a raw text, or a dict. Raises `InputError`.

        A dict has one of `messages`, `prompt` and `prompt_token_ids`, and optionally `images`,
        `videos` and, with messages, tools. `from_json`: as in `read_conversation`.
        """
        if isinstance(prompt, ParsedPrompt):
            return prompt
        if not isinstance(prompt, Mapping):
            name = "prompt" if isinstance(prompt, str) else "messages"
            prompt = {name: prompt, "images": images, "videos": videos}
        for name in prompt:
            if name not in (*BODIES, *MEDIA_FIELDS, *TOOL_FIELDS):
                known = sorted((*BODIES, *MEDIA_FIELDS, *TOOL_FIELDS))
                raise InputError(name, f"{name}: unknown; allowed are {', '.join(known)}")
        kinds = [name for name in BODIES if name in prompt]
        if len(kinds) != 1:
            raise InputError("prompt", "pass exactly one of prompt, prompt_token_ids and messages")
        body = prompt[kinds[0]]
        images, videos = (_media(name, prompt.get(name)) for name in MEDIA_FIELDS)
        if kinds == ["messages"]:
            tools = ToolUse.of(prompt)
            conversation = read_conversation(body, tools.shown, from_json)
            return cls(conversation, images, videos, tools)
        for name in TOOL_FIELDS:
            if prompt.get(name):
                raise InputError(name, "is only allowed with messages")
        if kinds == ["prompt"] and not isinstance(body, str):
            raise InputError("prompt", f"must be a string, not {type(body).__name__}")
        is_text = isinstance(body, str | bytes)
        if kinds == ["prompt_token_ids"] and (is_text or not isinstance(body, Sequence | array)):
            raise InputError("prompt_token_ids", f"must be a list, not {type(body).__name__}")
        return cls(body, images, videos)


def has_many_parts(prompt: Any) -> bool:
    """Return whether to read a prompt in a thread, to keep the event loop responsive."""
    messages = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return False
    few = messages[:MAX_AT_ONCE]
    contents = (each.get("content") for each in few if isinstance(each, Mapping))
    num_parts = sum(len(each) for each in contents if isinstance(each, list | tuple))
    return len(messages) + num_parts > MAX_AT_ONCE


def _media(name: str, given: Any) -> Sequence[Any]:
    if given is not None and (isinstance(given, str | bytes) or not isinstance(given, Sequence)):
        raise InputError(name, f"must be a list, not {type(given).__name__}")
    return given or ()


@dataclass(frozen=True)
class PromptSize:
    """Kind and size of a prompt, which select the threads that preprocess it."""

    lane: str  # a field of `PreprocessPools`
    source_bytes: int  # of media as received: files, data URIs, arrays
    text_bytes: int  # of texts or token ids in memory; 0 up to LONG_TEXT characters

    @classmethod
    def of(cls, prompt: ParsedPrompt) -> PromptSize:
        sources = [*_sources(prompt)]
        body = prompt.body
        texts: Sequence[Any] = body.texts if isinstance(body, Conversation) else (body,)
        is_long = sum(map(len, texts)) > LONG_TEXT
        flat = list(islice(_flat(source for _, source in sources), MAX_SOURCES))
        return cls(
            lane=_lane_of({kind for kind, _ in sources}, any(map(_is_url, flat)), is_long),
            source_bytes=sum(map(_num_bytes, flat)),
            text_bytes=sum(map(_text_bytes, texts)) if is_long else 0,
        )


def _lane_of(kinds: Set[str], has_url: bool, is_long: bool) -> str:
    if has_url:
        return "urls"
    if "video" in kinds:
        return "videos"
    if kinds:
        return "images"
    return "long_texts" if is_long else "text"


def _sources(prompt: ParsedPrompt) -> Iterator[tuple[str, Any]]:
    """Yield the kind and the source of each image and video."""
    for kind, given in (("image", prompt.images), ("video", prompt.videos)):
        for each in given:
            yield kind, each.get(kind) if isinstance(each, Mapping) else each
    if isinstance(prompt.body, Conversation):
        for part in prompt.body.media:
            yield part.kind, part.source


def _flat(sources: Iterable[Any]) -> Iterator[Any]:
    """Yield the sources, and each frame of those that are lists of frames."""
    for source in sources:
        if isinstance(source, Sequence) and not isinstance(source, BYTES):
            yield from source
        else:
            yield source


def _is_url(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def _text_bytes(text: Sequence[Any]) -> int:
    return getsizeof(text) if isinstance(text, str) else len(text) * TOKEN_ID_BYTES


def _num_bytes(source: Any) -> int:
    if isinstance(source, BYTES):
        return len(source)
    size = getattr(getattr(source, "values", source), "nbytes", 0)
    return size if isinstance(size, int) else 0
