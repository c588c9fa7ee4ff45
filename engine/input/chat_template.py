"""Messages to token ids through the checkpoint's chat template.

The template is rendered with a mark in the place of each text. The rendering is cut at the added
tokens that the template itself issued, the marks are replaced by the texts, and each run between
two added tokens is encoded whole as plain text. So no text can forge a turn or a placeholder.
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

ROLES = ("system", "user", "assistant", "tool")
MEDIA_KINDS = ("image", "video")
MAX_MESSAGES = 4096
MAX_PARTS = 1 << 14  # of all messages
MAX_TEXT = 8 << 20  # characters of all texts


@dataclass(frozen=True)
class MediaPart:
    """An image or a video of a message: where it stands, and what was written beside it."""

    field: str  # "messages[0].content[1]"
    kind: str  # "image" | "video"
    part: Mapping[str, Any]
    name: str = ""  # of its source in what was written: "image_url.url"; empty: its kind

    @property
    def place(self) -> str:
        """Of its source, for errors."""
        return f"{self.field}.{self.name or self.kind}"

    @property
    def source(self) -> Any:
        """None where the part is a placeholder for one of the call's `images` or `videos`."""
        return self.part.get(self.kind)


@dataclass(frozen=True)
class Conversation:
    """Checked messages: for the template, with marks for texts, and what the marks stand for."""

    messages: list[dict[str, Any]]
    texts: list[str]
    media: list[MediaPart]
    tools: list[Written]


def check_parts(num_messages: int, num_parts: Iterable[int]) -> None:
    """Refuses a conversation of too many things before it is gone through, which a server's loop
    would wait for. `num_parts`: of each message. Raises `InputError`."""
    total = 0 if num_messages > MAX_MESSAGES else sum(num_parts)
    if num_messages > MAX_MESSAGES or total > MAX_PARTS:
        found = f"{num_messages} messages, {total} parts"
        raise InputError("messages", f"{found}; at most {MAX_MESSAGES} and {MAX_PARTS} are taken")


def read_messages(messages: Any, tools: Any = None) -> Conversation:
    """Checks a conversation's form. Raises `InputError`."""
    written = read_tools(tools)
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InputError("messages", f"must be a list, not {type(messages).__name__}")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InputError("messages", f"{len(messages)} of them; must be 1 to {MAX_MESSAGES}")
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
    beside = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}.get(role, ())
    _refuse_unknown(field, message, ("role", "content", *beside))
    if role == "tool":
        return _read_result(field, message, found)
    if message.get("tool_calls"):
        return _read_answer(field, message, found)
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise InputError(f"{field}.content", "must be a text or a list of parts")
    if role == "user" and not any(map(_says_something, [content, *content])):
        raise InputError(f"{field}.content", "is empty")
    if isinstance(content, str):
        return {"role": role, "content": _mark(content, f"{field}.content", found)}
    parts = [_read_part(f"{field}.content[{i}]", part, found) for i, part in enumerate(content)]
    return {"role": role, "content": parts}


def _read_result(field: str, message: Mapping[str, Any], found: Conversation) -> dict[str, Any]:
    """What a call gave. Qwen's form has no ids: results stand in the order of the calls."""
    given = message.get("tool_call_id", "")
    text = _text_of(f"{field}.content", message.get("content"), found)
    called = _mark(given, f"{field}.tool_call_id", found)
    return {"role": "tool", "content": text, "tool_call_id": called}


def _read_answer(field: str, message: Mapping[str, Any], found: Conversation) -> dict[str, Any]:
    """An answer with calls."""
    content = message.get("content")
    text = _text_of(f"{field}.content", content, found) if content else ""
    calls = []
    for name, arguments in read_calls(message["tool_calls"], f"{field}.tool_calls"):
        written = Written(read_value(arguments.encode()), _mark(arguments, field, found))
        function = {"name": name, "arguments": written}
        calls.append({"type": "function", "function": function})
    return {"role": "assistant", "content": text, "tool_calls": calls}


def _text_of(field: str, content: Any, found: Conversation) -> str:
    """Marks of a text, or of the texts of parts."""
    if isinstance(content, str):
        return _mark(content, field, found)
    if not isinstance(content, list | tuple):
        raise InputError(field, "must be a text or a list of texts")
    parts = [_read_part(f"{field}[{i}]", part, found) for i, part in enumerate(content)]
    for i, part in enumerate(parts):
        if part["type"] != "text":
            raise InputError(f"{field}[{i}].type", f"{part['type']}; only text is taken here")
    return "".join(part["text"] for part in parts)


def _says_something(content: Any) -> bool:
    """True of text that is not empty and of every part but an empty text."""
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
        _refuse_unknown(field, part, ("type", "text"))
        return {"type": "text", "text": _mark(part.get("text"), f"{field}.text", found)}
    name = ""
    if kind in URLS:
        name = f"{kind}.url" if isinstance(part.get(kind), Mapping) else kind
        part = read_media(part, kind, f"{field}.{kind}")
        kind = part["type"]
    if kind not in MEDIA_KINDS:
        raise InputError(
            f"{field}.type",
            f"{truncated_repr(kind)}; must be text, image, video or OpenAI's image_url, video_url",
        )
    found.media.append(MediaPart(field, kind, part, name))
    return {"type": kind, kind: ""}


def _refuse_unknown(field: str, given: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                field, f"{truncated_repr(name)} is unknown; it has {' and '.join(known)}"
            )


def _mark(text: Any, field: str, found: Conversation) -> str:
    return add_mark(check_text(text, field), found.texts)


def check_text(text: Any, field: str) -> str:
    """The text, if it is one that can be encoded."""
    if not isinstance(text, str):
        raise InputError(field, f"must be a text, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise InputError(field, f"{len(text)} characters of text; at most {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(field, "has half a surrogate pair: not Unicode text") from None
    return text


class ChatTemplate:
    """The checkpoint's template, in jinja2's sandbox."""

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
        except InputError as error:  # other messages may be valid, unless it took too long
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
            own = f": {error}" if type(error) is TemplateError else ""  # others are jinja's words
            raise InputError("messages", f"the chat template refuses them{own}") from None
        token_ids: list[int] = []
        for part, token in self._tokenizer.split_added(rendered):
            run = MARK.sub(lambda mark: texts[int(mark[1])], part)
            token_ids += self._tokenizer.encode_plain(run, budget)
            if token:
                token_ids.append(self._tokenizer.added[token])
        return token_ids

    def _turns(self, conversation: Conversation, texts: list[str]) -> dict[str, Any]:
        """What the template is given to go through; new marks' texts are added to `texts`."""
        messages, tools = conversation.messages, conversation.tools
        if not self._has_tools:
            return {"messages": in_qwens_form(messages, tools)}

        def mark(text: str) -> str:
            forges = "\0" in text or self._tokenizer.has_added(text)
            return add_mark(text, texts) if forges else text

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
    raise ConfigError(f"{model_dir}: no chat template (chat_template.json, tokenizer_config.json)")


def _raise(text: str) -> None:
    raise TemplateError(text)
