"""Generate `docs/api.md` from the comments of `octavo.proto`.

python proto/make_docs.py > docs/api.md

The .proto file is parsed as text, and must keep its current formatting style.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PROTO = Path(__file__).with_name("octavo.proto")
BLOCK = re.compile(r"(service|message|enum) (\w+) \{(\})?$")
RPC = re.compile(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\);$")
FIELD = re.compile(r"(optional |repeated )?([\w<>, ]*?) ?\b(\w+) = (\d+);(?:  // (.*))?$")
CODE = re.compile(r"[A-Z_]{5,}: ")
NOTE = "<!-- Generated from proto/octavo.proto by proto/make_docs.py. -->"


def api_page(proto: str) -> str:
    """Return the page as Markdown."""
    head, _, body = proto.partition('syntax = "proto3";')
    lines = ["# The gRPC interface, `octavo.v1`", "", NOTE, "", *_prose(head)]
    return "\n".join([*lines, *_blocks(body)]) + "\n"


def _prose(head: str) -> Iterator[str]:
    """Yield paragraphs. Lines that start with a status code become list items."""
    in_list = False
    for line in (line.removeprefix("//").strip() for line in head.splitlines()):
        code = CODE.match(line)
        in_list = bool(code) or (in_list and line != "")
        if code:
            yield f"- **{code[0][:-2]}**: {line[code.end() :]}"
        else:
            yield f"  {line}" if in_list else line
    yield ""


def _blocks(body: str) -> Iterator[str]:
    comments: list[str] = []  # comment lines above the current line
    choice = ""  # the enclosing oneof
    kind = ""
    lines = iter(body.splitlines())
    for line in map(str.strip, lines):
        if line.startswith("// "):
            comments.append(line[3:])
            continue
        if found := BLOCK.match(line):
            kind = found[1]
            yield from (
                f"## `{kind} {found[2]}`",
                "",
                *([" ".join(comments), ""] if comments else []),
            )
            yield from _columns(kind, is_empty=bool(found[3]))
        elif found := RPC.match(line):
            answer = f"{found[3] or ''}{found[4]}"
            yield f"- `{found[1]}({found[2]}) → {answer}` {' '.join(comments)}".rstrip()
        elif line.startswith("oneof "):
            choice = line.split()[1]
        elif line == "}":
            if not choice:
                yield ""
            choice = ""
        elif (found := FIELD.match(line)) and kind:
            yield _row(kind, found, [*comments, *([found[5]] if found[5] else [])], choice)
        comments = []


def _columns(kind: str, is_empty: bool) -> list[str]:
    if is_empty:
        return ["No fields.", ""]
    if kind == "service":
        return []
    names = "| value | number | |" if kind == "enum" else "| field | type | number | |"
    return [names, "|---" * (names.count("|") - 1) + "|"]


def _row(kind: str, found: re.Match[str], comments: list[str], choice: str) -> str:
    text = " ".join([*([f"(one of `{choice}`)"] if choice else []), *comments])
    text = text.replace("|", "\\|").replace("<", "&lt;")
    if kind == "enum":
        return f"| `{found[3]}` | {found[4]} | {text} |"
    return f"| `{found[3]}` | {found[1] or ''}{found[2]} | {found[4]} | {text} |"


if __name__ == "__main__":
    print(api_page(PROTO.read_text(encoding="utf-8")), end="")
