"""Encode messages to token ids with the checkpoint's chat template.

The template is rendered with a marker in place of each text. The result is split at the added
tokens that the template itself wrote, the markers are replaced by the texts, and each part between
two added tokens is encoded as plain text. So no text can inject a turn or a placeholder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta

from ...scheduler.params import truncated_repr
from ..config.engine_config import read_json
from ..config.json_files import read_text
from ..errors import ConfigError, InputError
from ..tool_calling.chat_turns import (
    MARK,
    TEXTS,
    Written,
    add_mark,
    as_they_are,
    in_order_of_calls,
    in_qwens_form,
    to_json,
)
from ..tool_calling.schema import read_calls, read_tools
from ..utils.json_reader import read_json as read_value
from ..utils.openai_fields import IGNORED_OF_PART, without, without_ignored
from .openai_parts import URLS, read_media, with_type
from .template_environment import BoundedEnvironment, TemplateLimitError
from .tokenizer import TextBudget, TextTokenizer

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

    messages: list[dict[str, Any]]
    texts: list[str]
    media: list[MediaPart]
    tools: list[Written]


def check_parts(num_messages: int, num_parts: Iterable[int]) -> None:
    """Raise `InputError` if a conversation has too many messages or parts.

    Call it before reading the conversation in a server's event loop. `num_parts`: parts of each
    message.
    """
    total = 0 if num_messages > MAX_MESSAGES else sum(num_parts)
    if num_messages > MAX_MESSAGES or total > MAX_PARTS:
        found = f"{num_messages} messages, {total} parts"
        raise InputError("messages", f"{found}; the maximum is {MAX_MESSAGES} and {MAX_PARTS}")


def read_messages(messages: Any, tools: Any = None) -> Conversation:
    """Validate a conversation and its tools. Raises `InputError`."""
    written = read_tools(tools)
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InputError("messages", f"must be a list, not {type(messages).__name__}")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InputError("messages", f"has {len(messages)} items; must be 1 to {MAX_MESSAGES}")
    found = Conversation([], [], [], [])
    for index, message in enumerate(messages):
        found.messages.append(_read_message(f"messages[{index}]", message, found))
    found.messages[:] = [found.messages[at] for at in in_order_of_calls(messages)]
    for text in written:
        found.tools.append(Written(read_value(text.encode()), _mark(text, "tools", found)))
    size = sum(map(len, found.texts))
    if size > MAX_TEXT:
        raise InputError("messages", f"{size} characters of text; at most {MAX_TEXT}")
    return found


def _read_message(field: str, message: Any, found: Conversation) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(field, f"must be a dict, not {type(message).__name__}")
    message = without_ignored(message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(
            f"{field}.role", f"{truncated_repr(role)}; must be one of {', '.join(ROLES)}"
        )
    extra = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}.get(role, ())
    _reject_unknown(field, message, ("role", "content", *extra))
    if message.get("tool_calls"):
        return _read_answer(field, message, found)
    if content is None:
        raise InputError(f"{field}.content", "must be a string or a list of parts")
    if role == "tool":
        return _read_result(field, message, found)
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise InputError(f"{field}.content", "must be a string or a list of parts")
    if role == "user" and not any(map(_is_not_empty, [content, *content])):
        raise InputError(f"{field}.content", "is empty")
    if isinstance(content, str):
        return {"role": role, "content": _mark(content, f"{field}.content", found)}
    parts = [_read_part(f"{field}.content[{i}]", part, found) for i, part in enumerate(content)]
    return {"role": role, "content": parts}


def _read_result(field: str, message: Mapping[str, Any], found: Conversation) -> dict[str, Any]:
    """Read a tool result. Qwen's format has no ids; results follow the order of the calls."""
    given = message.get("tool_call_id", "")
    text = _text_of(f"{field}.content", message.get("content"), found)
    called = _mark(given, f"{field}.tool_call_id", found)
    return {"role": "tool", "content": text, "tool_call_id": called}


def _read_answer(field: str, message: Mapping[str, Any], found: Conversation) -> dict[str, Any]:
    """Read an assistant message with tool calls."""
    content = message.get("content")
    is_empty = not content or (
        isinstance(content, list | tuple) and all(p in EMPTY for p in content)
    )
    text = "" if is_empty else _text_of(f"{field}.content", content, found)
    calls = []
    for name, arguments in read_calls(message["tool_calls"], f"{field}.tool_calls"):
        written = Written(read_value(arguments.encode()), _mark(arguments, field, found))
        function = {"name": name, "arguments": written}
        calls.append({"type": "function", "function": function})
    return {"role": "assistant", "content": text, "tool_calls": calls}


def _text_of(field: str, content: Any, found: Conversation) -> str:
    """Return the marker of a text, or the markers of text parts."""
    if isinstance(content, str):
        return _mark(content, field, found)
    if not isinstance(content, list | tuple):
        raise InputError(field, "must be a string or a list of text parts")
    parts = [_read_part(f"{field}[{i}]", part, found) for i, part in enumerate(content)]
    for i, part in enumerate(parts):
        if part["type"] != "text":
            raise InputError(f"{field}[{i}].type", f"{part['type']}; only text is allowed here")
    return "".join(part["text"] for part in parts)


def _is_not_empty(content: Any) -> bool:
    """Return whether this is non-empty text, or a part other than an empty text."""
    if isinstance(content, Mapping):
        return (
            content.get("type", "text") != "text"
            or "text" not in content
            or content.get("text") != ""
        )
    return isinstance(content, str) and content != ""


def _read_part(field: str, part: Any, found: Conversation) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise InputError(field, f"must be a dict, not {type(part).__name__}")
    part = with_type(without(part, IGNORED_OF_PART), field)
    kind = part.get("type")
    if kind == "text":
        _reject_unknown(field, part, ("type", "text"))
        return {"type": "text", "text": _mark(part.get("text"), f"{field}.text", found)}
    name = ""
    if kind in URLS:
        name = f"{kind}.url" if isinstance(part.get(kind), Mapping) else kind
        part = read_media(part, kind, f"{field}.{kind}")
        kind = part["type"]
    if kind not in MEDIA_KINDS:
        raise InputError(
            f"{field}.type",
            f"{truncated_repr(kind)}; must be text, image, video, image_url or video_url",
        )
    found.media.append(MediaPart(field, kind, part, name))
    return {"type": kind, kind: ""}


def _reject_unknown(field: str, given: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                field, f"{truncated_repr(name)} is unknown; allowed are {' and '.join(known)}"
            )


def _mark(text: Any, field: str, found: Conversation) -> str:
    return add_mark(check_text(text, field), found.texts)


def check_text(text: Any, field: str) -> str:
    """Return the text. Raises `InputError` if it is not a valid Unicode string."""
    if not isinstance(text, str):
        raise InputError(field, f"must be a string, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise InputError(field, f"{len(text)} characters of text; at most {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(field, "has an unpaired surrogate; must be valid Unicode") from None
    return text


class ChatTemplate:
    """The checkpoint's chat template, rendered in jinja2's sandbox."""

    def __init__(self, model_dir: Path, tokenizer: TextTokenizer) -> None:
        environment = self._environment = BoundedEnvironment()
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = to_json
        self._tokenizer = tokenizer
        text = _template_text(model_dir)
        try:
            self._template = environment.from_string(text)
            self._has_tools = "tools" in meta.find_undeclared_variables(environment.parse(text))
        except TemplateError as error:
            raise ConfigError(f"{model_dir}: its chat template does not parse: {error}") from None
        try:
            self.encode(read_messages([{"role": "user", "content": "Hello"}]))
        except InputError as error:  # Other messages may render, unless a limit was exceeded.
            if isinstance(error.__cause__, TemplateLimitError):
                text = f"{model_dir}: its chat template {error.__cause__}; replace it"
                raise ConfigError(text) from None

    def encode(self, conversation: Conversation, budget: TextBudget | None = None) -> list[int]:
        """Return token ids with one placeholder token for each image or video.

        Raises `TooLong` over the budget.
        """
        texts = [*conversation.texts]
        try:
            rendered = self._environment.render(
                self._template,
                **self._turns(conversation, texts),
                **{TEXTS: texts},
                add_generation_prompt=True,
                add_vision_id=False,
            )
        except TemplateLimitError as error:
            raise InputError("messages", f"the chat template {error}") from error
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            # Only messages of the template's raise_exception are meant for clients.
            reason = f": {error}" if type(error) is TemplateError else ""
            raise InputError("messages", f"rejected by the chat template{reason}") from None
        token_ids: list[int] = []
        for part, token in self._tokenizer.split_added(rendered):
            run = MARK.sub(lambda mark: texts[int(mark[1])], part)
            token_ids += self._tokenizer.encode_plain(run, budget)
            if token:
                token_ids.append(self._tokenizer.added[token])
        return token_ids

    def _turns(self, conversation: Conversation, texts: list[str]) -> dict[str, Any]:
        """Return the template's variables. Texts of new markers are appended to `texts`."""
        messages, tools = conversation.messages, conversation.tools
        if not self._has_tools:
            return {"messages": in_qwens_form(messages, tools)}

        def mark(text: str) -> str:
            is_unsafe = "\0" in text or self._tokenizer.has_added(text)
            return add_mark(text, texts) if is_unsafe else text

        return {
            "messages": as_they_are(messages, mark),
            "tools": as_they_are(tools, mark) or None,
        }


def _template_text(model_dir: Path) -> str:
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(model_dir / name, missing_ok=True).get("chat_template")
        if isinstance(found, str):
            return found
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    raise ConfigError(
        f"{model_dir}: has no chat template; add chat_template.json, chat_template.jinja or "
        "chat_template in tokenizer_config.json"
    )


def _raise(text: str) -> None:
    raise TemplateError(text)
