"""Read a conversation once: validated messages, their texts and their media.

Texts are replaced by markers, so that the chat template cannot confuse them with its own text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import InputError
from ..tool_calling.chat_turns import MARK, Written, add_mark, in_order_of_calls
from ..tool_calling.schema import read_calls
from ..utils.json_reader import read_json as read_value
from ..utils.openai_fields import IGNORED_OF_PART, without, without_ignored
from .openai_parts import URLS, read_media, with_type

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA_KINDS = ("image", "video")
EMPTY = ("", {"text": ""}, {"type": "text", "text": ""})  # parts without effect
MAX_MESSAGES = 4096
MAX_PARTS = 1 << 14  # total over all messages
MAX_TEXT = 8 << 20  # characters, total over all texts


@dataclass(frozen=True)
class MediaPart:
    """An image or video part of a message, with its field path and options."""

    field: str  # "messages[0].content[1]"
    kind: str  # "image" | "video"
    part: Mapping[str, Any]
    name: str = ""  # key of the source in the request, such as "image_url.url"; empty: `kind`

    @property
    def place(self) -> str:
        """Field path of the source, for errors."""
        return f"{self.field}.{self.name or self.kind}"

    @property
    def source(self) -> Any:
        """The source; None if the part is a placeholder for one of `images` or `videos`."""
        return self.part.get(self.kind)


@dataclass(frozen=True)
class Conversation:
    """Validated messages with markers in place of texts, and the texts they stand for."""

    messages: Sequence[Mapping[str, Any]]
    texts: Sequence[str]
    media: Sequence[MediaPart]
    tools: Sequence[Written]

    def atoms(self) -> Iterator[tuple[str, Any]]:
        """Yield ("role", "text", "image" or "video", value) of each part, in prompt order."""
        media = iter(self.media)
        for message in self.messages:
            yield "role", message["role"]
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] != "text":
                    yield part["type"], next(media).part
                for mark in MARK.finditer(part.get("text", "")):
                    yield "text", self.texts[int(mark[1])]


def check_parts(num_messages: int, num_parts: Iterable[int]) -> None:
    """Raise `InputError` if a conversation has too many messages or parts.

    Call it before reading the conversation in a server's event loop. `num_parts`: parts of each
    message.
    """
    total = 0 if num_messages > MAX_MESSAGES else sum(num_parts)
    if num_messages > MAX_MESSAGES or total > MAX_PARTS:
        found = f"{num_messages} messages, {total} parts"
        raise InputError("messages", f"{found}; the maximum is {MAX_MESSAGES} and {MAX_PARTS}")


def read_conversation(
    messages: Any, tools: Sequence[str] = (), from_json: bool = False
) -> Conversation:
    """Validate messages in the model card's or OpenAI's format. Raises `InputError`.

    `tools`: JSON of each tool. `from_json`: media sources are URLs or data URIs.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InputError("messages", f"must be a list, not {type(messages).__name__}")
    if from_json:
        contents = (each.get("content") for each in messages if isinstance(each, dict))
        check_parts(len(messages), (len(each) for each in contents if isinstance(each, list)))
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InputError("messages", f"has {len(messages)} items; must be 1 to {MAX_MESSAGES}")
    reader = _Reader(from_json)
    read = [reader.message(f"messages[{m}]", message) for m, message in enumerate(messages)]
    ordered = tuple(read[at] for at in in_order_of_calls(messages))
    written = [Written(read_value(text.encode()), reader.mark(text, "tools")) for text in tools]
    size = sum(map(len, reader.texts))
    if size > MAX_TEXT:
        raise InputError("messages", f"{size} characters of text; at most {MAX_TEXT}")
    return Conversation(ordered, tuple(reader.texts), tuple(reader.media), tuple(written))


@dataclass
class _Reader:
    """Reads messages, and collects their texts and media."""

    from_json: bool
    texts: list[str] = field(default_factory=list)
    media: list[MediaPart] = field(default_factory=list)

    def message(self, field: str, message: Any) -> dict[str, Any]:
        self._check_mapping(field, message)
        if not isinstance(message.get("name"), str | None):
            raise InputError(f"{field}.name", "must be a string")
        if self.from_json:  # null and [] stand for an absent field
            message = {k: v for k, v in message.items() if k == "content" or v not in (None, [])}
        message = without_ignored(message)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            text = f"{truncated_repr(role)}; must be one of {', '.join(ROLES)}"
            raise InputError(f"{field}.role", text)
        if "function_call" in message:
            raise InputError(f"{field}.function_call", "is not supported; use tool_calls")
        extra = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}.get(role, ())
        _reject_unknown(field, message, ("role", "content", *extra))
        if message.get("tool_calls"):
            return self._answer(field, message)
        if content is None and role == "assistant":  # for example an echoed refusal
            content = ""
        if content is None or isinstance(content, bytes) or not isinstance(content, Sequence):
            raise InputError(f"{field}.content", "must be a string or a list of parts")
        if role == "tool":
            return self._result(field, message)
        if role == "developer":  # OpenAI's newer name
            role = "system"
        if role == "user" and not any(map(_is_not_empty, [content, *content])):
            raise InputError(f"{field}.content", "is empty")
        if isinstance(content, str):
            return {"role": role, "content": self.mark(content, f"{field}.content")}
        parts = [self._part(f"{field}.content[{i}]", part) for i, part in enumerate(content)]
        return {"role": role, "content": parts}

    def _result(self, field: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Read a tool result. Qwen's format has no ids; results follow the order of the calls."""
        given = message.get("tool_call_id", "")
        text = self._text_of(f"{field}.content", message["content"])
        called = self.mark(given, f"{field}.tool_call_id")
        return {"role": "tool", "content": text, "tool_call_id": called}

    def _answer(self, field: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Read an assistant message with tool calls."""
        content = message.get("content")
        is_list = isinstance(content, list | tuple)
        is_empty = not content or (is_list and all(part in EMPTY for part in content))
        text = "" if is_empty else self._text_of(f"{field}.content", content)
        calls = []
        for name, arguments in read_calls(message["tool_calls"], f"{field}.tool_calls"):
            written = Written(read_value(arguments.encode()), self.mark(arguments, field))
            function = {"name": name, "arguments": written}
            calls.append({"type": "function", "function": function})
        return {"role": "assistant", "content": text, "tool_calls": calls}

    def _text_of(self, field: str, content: Any) -> str:
        """Return the marker of a text, or the markers of text parts."""
        if isinstance(content, str):
            return self.mark(content, field)
        if not isinstance(content, list | tuple):
            raise InputError(field, "must be a string or a list of text parts")
        parts = [self._part(f"{field}[{i}]", part) for i, part in enumerate(content)]
        for i, part in enumerate(parts):
            if part["type"] != "text":
                raise InputError(f"{field}[{i}].type", f"{part['type']}; only text is allowed here")
        return "".join(part["text"] for part in parts)

    def _part(self, field: str, part: Any) -> dict[str, Any]:
        self._check_mapping(field, part)
        part = with_type(without(part, IGNORED_OF_PART), field)
        kind = part.get("type")
        if kind == "text":
            _reject_unknown(field, part, ("type", "text"))
            return {"type": "text", "text": self.mark(part.get("text"), f"{field}.text")}
        name = ""
        if kind in URLS or (self.from_json and kind in MEDIA_KINDS):
            name = f"{kind}.url" if isinstance(part.get(kind), Mapping) else kind
            part = read_media(part, kind, f"{field}.{kind}")
            kind = part["type"]
        if kind not in MEDIA_KINDS:
            known = "image_url or video_url"
            known = (
                f": must be text, {known}"
                if self.from_json
                else f"; must be text, image, video, {known}"
            )
            raise InputError(f"{field}.type", truncated_repr(kind) + known)
        self.media.append(MediaPart(field, kind, part, name))
        return {"type": kind, kind: ""}

    def mark(self, text: Any, field: str) -> str:
        return add_mark(check_text(text, field), self.texts)

    def _check_mapping(self, field: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            kind = "an object" if self.from_json else "a dict"
            raise InputError(field, f"must be {kind}, not {type(value).__name__}")


def _is_not_empty(content: Any) -> bool:
    """Return whether this is non-empty text, or a part other than an empty text."""
    if isinstance(content, Mapping):
        return (
            content.get("type", "text") != "text"
            or "text" not in content
            or content.get("text") != ""
        )
    return isinstance(content, str) and content != ""


def _reject_unknown(field: str, given: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                field, f"{truncated_repr(name)} is unknown; allowed are {' and '.join(known)}"
            )


def check_text(text: Any, field: str) -> str:
    """Return the text. Raises `InputError` if it is not a valid Unicode string."""
    if not isinstance(text, str):
        raise InputError(field, f"must be a string, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise InputError(field, f"{len(text)} characters of text; at most {MAX_TEXT}")
    try:
        if not text.isascii():  # otherwise without a copy
            text.encode()
    except UnicodeEncodeError:
        raise InputError(field, "has an unpaired surrogate; must be valid Unicode") from None
    return text
