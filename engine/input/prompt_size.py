"""The size of a prompt, which selects the thread pool that preprocesses it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from itertools import islice
from sys import getsizeof
from typing import Any

from .openai_parts import KIND_OF

KINDS = ("image", "video")
# Concrete types first: `isinstance` checks them faster than abstract ones.
MAPPINGS, SEQUENCES = (dict, Mapping), (list, tuple, Sequence)
BYTES = (str, bytes, bytearray, memoryview)
MAX_SOURCES = 1 << 14  # including the frames of lists; a larger request is rejected later
TOKEN_ID_BYTES = 40  # bytes per item of a list of ints
LONG_TEXT = 1 << 16  # characters; tokenizing them takes some tenths of a second of one core


@dataclass(frozen=True)
class PromptSize:
    """Kind and size of a prompt that is not validated yet."""

    lane: str  # a field of `PreprocessPools`; "text" for invalid prompts
    source_bytes: int  # of media as received: files, data URIs, arrays
    text_bytes: int  # of texts or token ids in memory; 0 up to LONG_TEXT characters

    @classmethod
    def of(cls, prompt: Any) -> PromptSize:
        values = list(_values(prompt))
        sources = [(kind, value) for kind, value in values if kind in KINDS]
        texts: list[Any] = [value for kind, value in values if kind not in KINDS]
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


def _flat(sources: Iterable[Any]) -> Iterator[Any]:
    """Yield the sources, and each frame of those that are lists of frames."""
    for source in sources:
        if isinstance(source, SEQUENCES) and not isinstance(source, BYTES):
            yield from source
        else:
            yield source


def _is_url(source: Any) -> bool:
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def _text_bytes(text: Sequence[Any]) -> int:
    return getsizeof(text) if isinstance(text, str) else len(text) * TOKEN_ID_BYTES


def _values(prompt: Any) -> Iterator[tuple[str, Any]]:
    """Yield ("image", "video" or "text", source or text) of each part of a prompt."""
    if isinstance(prompt, MAPPINGS):
        for kind in KINDS:
            for source in _list(prompt.get(f"{kind}s")):
                yield kind, source.get(kind) if isinstance(source, MAPPINGS) else source
        for name in ("prompt", "prompt_token_ids"):
            if isinstance(prompt.get(name), Sized):
                yield "text", prompt[name]
        prompt = prompt.get("messages")
    elif isinstance(prompt, str):
        yield "text", prompt
    for message in _list(prompt):
        content = message.get("content") if isinstance(message, MAPPINGS) else ()
        for part in (content,) if isinstance(content, str) else _list(content):
            if isinstance(part, str):
                yield "text", part
            elif isinstance(part, MAPPINGS):
                yield from _values_of_part(part)


def _values_of_part(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a part in the model card's or OpenAI's format, typed or not."""
    if isinstance(part.get("text"), str):
        yield "text", part["text"]
    for name, kind in KIND_OF.items():
        if name in part or part.get("type") == name:
            source = part.get(name)
            yield kind, source.get("url") if isinstance(source, MAPPINGS) else source


def _list(value: Any) -> Sequence[Any]:
    is_list = isinstance(value, SEQUENCES) and not isinstance(value, str | bytes)
    return value if is_list else ()


def _num_bytes(source: Any) -> int:
    if isinstance(source, BYTES):
        return len(source)
    size = getattr(getattr(source, "values", source), "nbytes", 0)
    return size if isinstance(size, int) else 0
