"""A checkpoint is a stranger's files: whatever is in them, the result is a clear `ConfigError` or a
model that works; never a traceback, a hang or memory without bound."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.cli.info import checkpoint_info
from octavo.engine.cli.main import app
from octavo.engine.config import json_files
from octavo.engine.config.engine_config import EngineConfig, ModelConfig
from octavo.engine.config.generation_config import generation_defaults
from octavo.engine.config.hub import is_complete
from octavo.engine.errors import ConfigError, InputError
from octavo.engine.input import template_environment
from octavo.engine.input.processor import InputProcessor
from octavo.engine.media.settings import media_settings

CONFIGURATIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
)
BAD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "x", "9" * 100, [], [0], [[]], [1, -1, 2], ["a", "b", "c"], {}, {"a": 1}),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), shards=2)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def make_processor(folder: Path) -> InputProcessor:
    config = ModelConfig.from_dir(folder)
    media = media_settings(EngineConfig(model=folder), config)
    settings = (media.access, media.limits, media.defaults)
    return InputProcessor(folder, config, media.preprocess, 256, 4, *settings)


def open_checkpoint(folder: Path) -> str:
    """Read all that an engine reads of a checkpoint but its weights. Return the weights' error."""
    processor = make_processor(folder)
    generation_defaults(folder)
    with contextlib.suppress(InputError):  # a valid model may have too few positions
        processor.begin({"messages": [{"role": "user", "content": "hello"}]})
    return checkpoint_info(str(folder), "huggingface", "float32", 1).weight_error


def fields_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield (*path, name)
            yield from fields_of(each, (*path, name))


def changed(raw: Any, path: tuple[str, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(raw))
    at = copy
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return copy


def test_the_unchanged_checkpoint_opens(checkpoint: Path) -> None:
    assert open_checkpoint(checkpoint) == ""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_value_of_any_field_is_read_or_rejected(
    checkpoint: Path, name: str, every: int
) -> None:
    """Each field with each bad value, or with each seventh."""
    raw = json.loads((checkpoint / name).read_text())
    num_rejected = 0
    for path, value in [*itertools.product(fields_of(raw), BAD_VALUES)][::every]:
        (checkpoint / name).write_text(json.dumps(changed(raw, path, value)))
        try:
            open_checkpoint(checkpoint)
        except ConfigError as error:
            num_rejected += 1
            assert len(str(error)) < 2000
    assert num_rejected > 0


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 10**12, r"vocab_size=1000000000000 must be an integer from 1 to"),
        ("num_hidden_layers", 10**9, r"num_hidden_layers=1000000000 must be"),
        ("num_attention_heads", 0, r"num_attention_heads=0 must be"),
        ("hidden_size", "64", r"hidden_size='64' must be an integer"),
        ("rms_norm_eps", float("nan"), r"rms_norm_eps=nan must be a number"),
        ("max_position_embeddings", -1, r"max_position_embeddings=-1 must be"),
        ("image_token_id", 2.0, r"image_token_id=2.0 must be an integer"),
    ],
)
def test_impossible_numbers_are_rejected_by_name(
    checkpoint: Path, field: str, value: Any, words: str
) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**raw, field: value}))
    with pytest.raises(ConfigError, match=rf"config\.json: {words}"):
        ModelConfig.from_dir(checkpoint)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 50)


def _deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63 - 1) + path.read_bytes()[8:])


CHANGES = (_directory, _fifo, _device, _loop, _empty, _garbage, _deep, _truncated, _long_header)
FILES = (
    *CONFIGURATIONS,
    "chat_template.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_rejected_by_name(
    checkpoint: Path, name: str, change: Callable[[Path], None]
) -> None:
    change(checkpoint / name)
    try:
        error = open_checkpoint(checkpoint)
    except ConfigError as found:
        error = str(found)
    assert name in error


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors", "x", 5]
)
def test_shards_outside_the_folder_are_rejected(checkpoint: Path, name: Any) -> None:
    index = checkpoint / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][next(iter(raw["weight_map"]))] = name
    index.write_text(json.dumps(raw))
    assert "must be a .safetensors file inside the checkpoint folder" in open_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match="inside the checkpoint folder"):
        is_complete(checkpoint)


def test_links_of_a_hub_cache_are_followed(checkpoint: Path) -> None:
    blobs = checkpoint.parent / "blobs"
    blobs.mkdir()
    for file in [*checkpoint.iterdir()]:
        file.rename(blobs / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert open_checkpoint(checkpoint) == "" and is_complete(checkpoint)


def test_large_files_are_not_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (checkpoint / "config.json").open("ab") as file:
        file.truncate(1 << 40)  # a file with a hole takes no space
    with pytest.raises(ConfigError, match=r"config.json: is larger than the limit"):
        json_files.read_json(checkpoint / "config.json")


def test_info_reports_what_is_wrong_with_weight_files(checkpoint: Path) -> None:
    _truncated(checkpoint / "model-00002-of-00002.safetensors")
    done = CliRunner().invoke(app, ["info", "--model", str(checkpoint)])
    assert done.exit_code == 0 and "model-00002-of-00002.safetensors: not readable" in done.stdout
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    found = checkpoint_info(str(checkpoint), "huggingface", "float32", 1)
    assert "no such file; the checkpoint is incomplete" in found.weight_error


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "filters": "{% for a in range(99999) %}{{ range(99999)|map('string')|join|length }}"
    "{% endfor %}",
    "product": "{{ 'a' * 999999999 }}",
    "product of a list": "{{ ([0] * 999999999)|length }}",
    "power": "{{ 9 ** 999999999 }}",
    "powers": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "addition": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "blocks": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "replacing": "{% set x = 'a' * 99999 %}{{ x|replace('a', x) }}",
    "replacing, as a method": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "joining": "{{ range(99999)|join('a' * 99999) }}",
    "joining, as a method": "{{ ('a' * 99999).join(['a'] * 99999) }}",
    "indenting": "{{ 'a'|indent(999999999, true) }}",
    "output": "{% set x = 'a' * 9999999 %}{% for i in range(99) %}{{ x }}{% endfor %}",
    "padding": "{{ 'a'.rjust(999999999) }}",
    "formatting": "{{ '{:999999999}'.format(1) }}",
    "old formatting": "{{ '%0999999999d' % 1 }}",
    "padding, as a filter": "{{ 'a'|center(999999999) }}",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_are_rejected(
    checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L32: also that a template cannot take all memory."""
    monkeypatch.setattr(template_environment, "MAX_SECONDS", 0.2)
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": ENDLESS[name]}))
    with pytest.raises((ConfigError, InputError), match="chat template"):
        make_processor(checkpoint).begin({"messages": [{"role": "user", "content": "hello"}]})


def test_a_template_that_loops_for_some_messages_fails_these_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_environment, "MAX_SECONDS", 0.2)
    text = f"{{% if messages|length > 1 %}}{ENDLESS['loops']}{{% endif %}}hello"
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert open_checkpoint(checkpoint) == ""
    processor = make_processor(checkpoint)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=r"chat template takes more than .* seconds"):
        processor.begin({"messages": turns})
    processor.begin({"messages": turns[:1]})
