"""Tool calls in an answer's text, found as it comes.

Qwen's form: `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, any number of them,
with free text around. The tags are read as text, which they are to Qwen2-VL's tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from .schema import NAME

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CUT_CALL = re.compile(
    rf'\s*{OPEN}\s*\{{\s*"name":\s*"(?P<name>{NAME.pattern})"'
    r'(?:\s*,\s*"arguments"\s*:\s*(?P<arguments>.*))?',
    re.DOTALL,
)
_DECODER = json.JSONDecoder()
_TEXT_BORDER = re.compile(r'\\.|"', re.DOTALL)  # in JSON: what opens or closes a text


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: str  # an object in JSON; its beginning, where the answer was cut off inside it
    id: str = ""  # once it is told


class ToolParser:
    """Of one answer. Whatever its text is cut into, the calls and the content are the same.

    What may still become a tag, and a call until its end, is held back. What stands between tags
    but is no call is content, tags and all: nothing is lost, and nothing raises. A line feed
    before a call belongs to it, as in Qwen's template.
    """

    def __init__(self) -> None:
        self._held = ""  # undecided; begins with the tag inside a call
        self._body: int | None = None  # inside a call: where its body begins in what is held
        self._scanned = 0  # inside a call: its text is looked through up to here
        self._in_text = False  # whether a JSON text is open there

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The content and the calls that `text` decides."""
        self._held += text
        content: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if self._body is None and not self._open(content):
                break
            end = self._find_end()
            if end is None:
                break
            call = read_call(self._held[self._body : end])
            end += len(CLOSE)
            if call is None:
                content.append(self._held[:end])
            else:
                calls.append(call)
            self._held, self._body = self._held[end:], None
        return "".join(content), tuple(calls)

    def flush(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Return what is undecided when the answer ends.

        A call whose JSON is complete counts, although its closing tag is missing or cut.
        """
        held = self.take()
        call = read_unclosed_call(held)
        return (held, ()) if call is None else ("", (call,))

    def take(self) -> str:
        """Return the undecided text and forget it."""
        held, self._held, self._body = self._held, "", None
        return held

    def _open(self, content: list[str]) -> bool:
        """Whether a call begins; what goes before it is content."""
        at = self._held.find(OPEN)
        if at < 0:
            keep = max(_overlap(self._held, OPEN), _overlap(self._held, "\n" + OPEN))
            content.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            return False
        start = at - (self._held[:at].endswith("\n"))
        content.append(self._held[:start])
        self._held = self._held[start:]
        self._body = self._scanned = at - start + len(OPEN)
        self._in_text = False
        return True

    def _find_end(self) -> int | None:
        """Where the call's closing tag stands: one in a JSON text is none."""
        while (end := self._held.find(CLOSE, self._scanned)) >= 0:
            for border in _TEXT_BORDER.finditer(self._held, self._scanned, end):
                self._in_text ^= border[0] == '"'
            if not self._in_text:
                return end
            self._scanned = end + len(CLOSE)
        return None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


def split_answer(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """A whole answer's content and calls."""
    parser = ToolParser()
    content, calls = parser.push(text)
    more, last = parser.flush()
    return content + more, calls + last


def read_call(text: str) -> ToolCall | None:
    """What stands between the tags; None where that is no call."""
    try:
        found = json.loads(text, parse_constant=_refuse)
        if not isinstance(found, dict) or not found.keys() <= {"name", "arguments"}:
            return None
        name, arguments = found.get("name"), found.get("arguments", {})
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return None
        return None if not isinstance(arguments, dict) else ToolCall(name, _dump(arguments))
    except (ValueError, RecursionError):
        return None


def read_unclosed_call(text: str) -> ToolCall | None:
    """Read a call from an answer's end: `text` lacks all or a part of the closing tag."""
    start = text.find(OPEN)
    if start < 0:
        return None
    body = text[start + len(OPEN) :]
    return read_call(body) or read_call(body[: len(body) - _overlap(body, CLOSE)])


def read_cut_call(text: str, name: str = "") -> ToolCall | None:
    """Read a call that was cut off inside its JSON, written as `tool_choice`'s grammar has it.

    `arguments` is as much of their JSON as there is. `name`: of the only function that may be
    called; without one, the call's name must be complete. None: the name is not known.
    """
    found = _CUT_CALL.match(text)
    if found is None:
        return ToolCall(name, "") if name else None
    arguments = found["arguments"] or ""
    with contextlib.suppress(ValueError, RecursionError):  # they are incomplete
        arguments = _dump(_DECODER.raw_decode(arguments)[0])
    return ToolCall(found["name"], arguments)


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return json.dumps(value, allow_nan=False)
    return text


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON
