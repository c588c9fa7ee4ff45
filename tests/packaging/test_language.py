"""Product code and documentation use the field's terms, not words of our own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "scheduler", "kernels", "benchmarks", "docs")
SUFFIXES = (".py", ".md", ".c", ".h")
FILES = sorted(
    [
        *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES),
        *ROOT.glob("*.md"),
    ]
)
# A private word, and the files that may contain it for a reason.
PRIVATE: dict[str, tuple[str, ...]] = {
    "door": ("benchmarks/streams/cli.py",),  # the option --door
    "doors": (),
    "anew": (),
    "begun": (),
    "beside": (),
    "blame": (),
    "blamed": (),
    "let go": (),
    "likeliest": (),
    "made ready": (),
    "nobody": (),
    "of ours": (),
    "on its way": (),
    "on their way": (),
    "once more": (),
    "somebody": (),
    "whoever": (),
}


def pages() -> list[Path]:
    return [path for path in FILES if not path.name.endswith("_pb2.py")]


@pytest.mark.parametrize("word", PRIVATE)
def test_no_private_word_is_used(word: str) -> None:
    pattern = re.compile(rf"(?<![\w-]){word}(?![\w-])", re.IGNORECASE)
    for path in pages():
        name = path.relative_to(ROOT).as_posix()
        if name not in PRIVATE[word]:
            found = pattern.search(path.read_text())
            assert found is None, f"{name}: {word!r}; CONTRIBUTING.md says how to write"
