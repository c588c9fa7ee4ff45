"""Incremental parser of tool calls in an answer's text.

Qwen's format: `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, repeated any
number of times, with other text in between. The tags are plain text, as in Qwen2-VL's tokenizer.
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
_TEXT_BORDER = re.compile(r'\\.|"', re.DOTALL)  # quotes of JSON strings; escapes are skipped


@dataclass(frozen=True)
class ToolCall:
    """Function call requested by the model."""

    name: str
    arguments: str  # JSON object; incomplete if the answer was truncated
    id: str = ""  # assigned when the call is returned


class ToolParser:
    """Parser of one answer. Calls and content do not depend on how the text is split.

    A possible start of a tag, and an incomplete call, are held back. Invalid calls are returned as
    content, including their tags. A line feed before a call belongs to it, as in Qwen's template.
    """

    def __init__(self) -> None:
        self._held = ""  # unresolved text; inside a call, it starts with the tag
        self._body: int | None = None  # inside a call: start of the body in the held text
        self._scanned = 0  # inside a call: end of the text searched so far
        self._in_text = False  # inside a call: whether a JSON string is open at `_scanned`

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Add text, and return new content and calls."""
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
        """Return the remaining content and calls at the end of the answer.

        A call with complete JSON is accepted even if its closing tag is missing or truncated.
        """
        held = self.take()
        call = read_unclosed_call(held)
        return (held, ()) if call is None else ("", (call,))

    def take(self) -> str:
        """Return and clear the held text."""
        held, self._held, self._body = self._held, "", None
        return held

    def _open(self, content: list[str]) -> bool:
        """Find the start of a call, and append the text before it to `content`."""
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
        """Return the position of the closing tag, ignoring tags inside JSON strings."""
        while (end := self._held.find(CLOSE, self._scanned)) >= 0:
            for border in _TEXT_BORDER.finditer(self._held, self._scanned, end):
                self._in_text ^= border[0] == '"'
            if not self._in_text:
                return end
            self._scanned = end + len(CLOSE)
        return None


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `tag`."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


def split_answer(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Return content and calls of a complete answer."""
    parser = ToolParser()
    content, calls = parser.push(text)
    more, last = parser.flush()
    return content + more, calls + last


def read_call(text: str) -> ToolCall | None:
    """Parse the text between the tags; None if it is not a valid call."""
    try:
        found = json.loads(text, parse_constant=_reject_constant)
        if not isinstance(found, dict) or not found.keys() <= {"name", "arguments"}:
            return None
        name, arguments = found.get("name"), found.get("arguments", {})
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return None
        return None if not isinstance(arguments, dict) else ToolCall(name, _dump(arguments))
    except (ValueError, RecursionError):
        return None


def read_unclosed_call(text: str) -> ToolCall | None:
    """Parse a call at the end of an answer, whose closing tag is missing or truncated."""
    start = text.find(OPEN)
    if start < 0:
        return None
    body = text[start + len(OPEN) :]
    return read_call(body) or read_call(body[: len(body) - _overlap(body, CLOSE)])


def read_cut_call(text: str, name: str = "") -> ToolCall | None:
    """Parse a call truncated inside its JSON, in the format of `tool_choice`'s grammar.

    The result's `arguments` are incomplete JSON. `name`: the only function that may be called, if
    any; otherwise the name in the text must be complete. Return None if the name is unknown.
    """
    found = _CUT_CALL.match(text)
    if found is None:
        return ToolCall(name, "") if name else None
    arguments = found["arguments"] or ""
    with contextlib.suppress(ValueError, RecursionError):  # incomplete JSON
        arguments = _dump(_DECODER.raw_decode(arguments)[0])
    return ToolCall(found["name"], arguments)


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can express as an escape
        return json.dumps(value, allow_nan=False)
    return text


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON
