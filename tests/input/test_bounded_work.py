"""Work on the event loop and under the GIL is bounded, whatever a request contains."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.engine.errors import InputError
from octavo.engine.input import conversation
from octavo.engine.input.conversation import check_text
from octavo.engine.input.parsed_prompt import MAX_SOURCES, ParsedPrompt, PromptSize
from octavo.engine.utils import json_reader
from octavo.engine.utils.json_reader import read_json


def test_a_text_is_measured_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Text(str):
        def encode(self, *arguments: Any) -> bytes:
            raise AssertionError("it is encoded")

    monkeypatch.setattr(conversation, "MAX_TEXT", 10)
    with pytest.raises(InputError, match="11 characters of text; at most 10"):
        check_text(Text("x" * 11), "prompt")


def test_at_most_so_many_frames_of_a_list_are_measured() -> None:
    video = {"type": "video_url", "video_url": {"url": ["abcd"] * (MAX_SOURCES + 100)}}
    size = PromptSize.of(ParsedPrompt.of([{"role": "user", "content": [video]}]))
    assert (size.lane, size.source_bytes) == ("videos", 4 * MAX_SOURCES)
    late = {"type": "video_url", "video_url": {"url": ["abcd", "HTTPS://a/b"]}}
    assert PromptSize.of(ParsedPrompt.of([{"role": "user", "content": [late]}])).lane == "urls"


class Counted(bytes):
    """Bytes that count how many of them are searched through."""

    searched = 0

    def find(self, stop: Any, start: Any = 0, end: Any = None) -> int:
        end = len(self) if end is None else end
        found = super().find(stop, start, end)
        Counted.searched += (end if found < 0 else found) - start
        return found


def test_strings_of_many_escapes_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_reader, "SMALL", 0)
    for part in ("a\n", "\n", 'a"', "é\\", "a\n" * 600 + "b" * 5000, "🙂\t"):
        value = {"text": part * 3000, "more": [part, "", part * 2]}
        data = Counted(json.dumps(value, ensure_ascii=False).encode())
        Counted.searched = 0
        assert read_json(data) == value
        assert Counted.searched < 4 * len(data), part
