"""README, CONTRIBUTING and docs: links, file names, commands and Python blocks are right.

Blocks after the comment `<!-- run -->` are run, against a server of the embedded model.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image, ImageDraw

from octavo.engine.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GUIDES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [README, *GUIDES, *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ("api.md", "openai.md")

BLOCK = re.compile(r"(<!-- run -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
SHELLS = ("sh",)
OPERATORS = ("&", "&&", "|", "||", ";", ">")
INTERNAL_NAMES = ("octavo.engine.replicas", "octavo.engine.replicas:app")  # that users write
SMALL = "kv_cache_memory_bytes=4_000_000, max_model_len=1024"
READY = re.compile(r"ready grpc=(\S+) http=(\S+) ")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    is_run: bool


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text())
    return [Block(match[2], match[3], bool(match[1])) for match in found]


def prose(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def by_name(page: Path) -> str:
    return page.name if page.parent == ROOT else f"docs/{page.name}"


each_page = pytest.mark.parametrize("page", PAGES, ids=by_name)


def test_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 14 * 1024


@each_page
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs/README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert page.name == "README.md" or f"]({page.name})" in text, page.name


@each_page
def test_python_files_exist(page: Path) -> None:
    for span in SPAN.findall(prose(page)):
        if re.fullmatch(r"[\w./]+/\w+\.py", span):
            assert (ROOT / span).exists(), span


@each_page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, by_name(page), "exec")


@pytest.mark.parametrize("page", [p for p in PAGES if p not in GUIDES], ids=by_name)
def test_pages_use_public_names(page: Path) -> None:
    for name in re.findall(r"octavo\.(?:engine|kernels|scheduler)[\w.:]*", page.read_text()):
        assert name.rstrip(".:") in INTERNAL_NAMES, name


def lines_of(page: Path) -> Iterator[list[str]]:
    """Yield each shell command of a page as words, also those in the text."""
    for block in blocks(page):
        if block.language in SHELLS:
            text = block.text.replace("\\\n", " ")
            for line in text.splitlines():
                if re.search(r"\b(octavo|make|pip)\b", line):
                    yield shlex.split(line, comments=True)
    for span in SPAN.findall(prose(page)):
        if re.match(r"(octavo|make) [a-z]|python -[mP] ", span):
            yield shlex.split(span.replace("\n", " "))


def commands(page: Path) -> Iterator[tuple[str, ...]]:
    """Yield each use of `octavo`, without what precedes and follows it in its line."""
    for words in lines_of(page):
        for start in (i for i, word in enumerate(words) if word == "octavo"):
            if words[start - 1 : start] == ["install"] or words[start + 1 : start + 2] == []:
                continue
            if start and ("-m" in words[:start] or "=" in words[start + 1][:1]):
                continue  # `python -m octavo.benchmarks.compare.run octavo vllm`
            ends = [i for i, word in enumerate(words) if i > start and word in OPERATORS]
            yield tuple(words[start + 1 : ends[0] if ends else None])


@each_page
def test_commands_are_in_shell_blocks(page: Path) -> None:
    for block in blocks(page):
        if block.language not in ("sh", "ini"):
            assert not re.search(r"^(octavo|make|pip|python3?) ", block.text, re.M), block.text


@each_page
def test_octavo_commands_have_these_options(page: Path) -> None:
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            name = rest.pop(0)
            assert name in command.commands, words
            command = command.commands[name]
        known = {opt for each in command.params for opt in (*each.opts, *each.secondary_opts)}
        for word in rest:
            if word.startswith("-") and len(word) > 1:
                assert word.partition("=")[0] in {*known, "--help"}, words


@each_page
def test_modules_targets_and_extras_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    extras = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M)
    for words in lines_of(page):
        if words[:1] == ["make"]:
            assert words[1] in targets, words
        for before, word in itertools.pairwise(words):
            if before == "-m" and word.startswith("octavo."):
                assert find_spec(word), word
            if match := re.fullmatch(r"(?:\.|octavo)\[([\w,]+)\]", word):
                assert set(match[1].split(",")) <= set(extras), word


def runnable(page: Path, languages: tuple[str, ...]) -> list[str]:
    return [b.text for b in blocks(page) if b.is_run and b.language in languages]


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """Addresses in the pages, and those of a server that runs."""
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--port", "0"]
    settings = ["--kv-cache-memory-bytes", "8000000", "--max-model-len", "2048"]
    process = subprocess.Popen(
        [*command, "--http-port", "0", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        ready = READY.match(process.stdout.readline())
        assert ready
        yield {"127.0.0.1:50051": ready[1], "127.0.0.1:8000": ready[2]}
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the picture that the pages name."""
    picture = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(picture).ellipse((50, 50, 170, 170), fill="red")
    picture.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_addresses(text: str, addresses: dict[str, str]) -> str:
    for written, real in addresses.items():
        text = text.replace(written, real)
    return text.replace("octavo.LLM()", f"octavo.LLM({SMALL})")


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p, ("python",))], ids=by_name)
def test_python_blocks_run(page: Path, addresses: dict[str, str], folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for text in runnable(page, ("python",)):
        exec(compile(with_addresses(text, addresses), by_name(page), "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p, SHELLS)], ids=by_name)
def test_shell_blocks_run(page: Path, addresses: dict[str, str], folder: Path) -> None:
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for text in runnable(page, SHELLS):
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", with_addresses(text, addresses)],
            env={**os.environ, "PATH": paths},
            check=True,
            timeout=120,
        )
