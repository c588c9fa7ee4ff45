"""Where a model's name leads: folders, local caches made by hand, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.config.hub import is_complete, resolve_model
from octavo.engine.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache: Path, name: str, shards: int = 2) -> Path:
    """Lays a checkpoint out as the hub's client does: refs, and a snapshot a commit."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return write_tiny_checkpoint(repo / "snapshots" / COMMIT, shards=shards)


def test_none_is_the_embedded_model() -> None:
    assert resolve_model(None) == EMBEDDED_MODEL


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    assert resolve_model("own/model").resolve() == tmp_path / "own" / "model"


def test_a_hub_id_is_found_in_the_local_cache(cache: Path) -> None:
    folder = put(cache, "Qwen/Qwen2-VL-0B")
    assert resolve_model("Qwen/Qwen2-VL-0B") == folder


def test_a_fresh_process_finds_it_through_hf_home(tmp_path: Path) -> None:
    folder = put(tmp_path / "hub", "Qwen/Qwen2-VL-0B")
    code = (
        "from octavo.engine.config.hub import resolve_model\n"
        "print(resolve_model('Qwen/Qwen2-VL-0B'))"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(folder)


def test_an_interrupted_download_is_not_taken_for_a_model(cache: Path) -> None:
    folder = put(cache, "Qwen/Qwen2-VL-0B")
    assert is_complete(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert not is_complete(folder)
    with pytest.raises(ConfigError, match="a part of the checkpoint"):
        resolve_model("Qwen/Qwen2-VL-0B")


def test_what_is_nowhere_is_rejected_by_name(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"Qwen/None: not a folder, .*Hugging Face"):
        resolve_model("Qwen/None")


@pytest.mark.parametrize(
    "name", ["", "no-such-folder", "../a", "/no/such/folder", "a/b/c", "a b/c"]
)
def test_what_is_no_hub_id_is_never_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="no such folder, and not a hub id"):
        resolve_model(name)


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_missing_package_is_named_with_its_extra(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[hub\]'"):
        resolve_model("Qwen/Qwen2-VL-2B-Instruct", source)


def test_modelscope_where_the_user_asks_for_it(tmp_path: Path) -> None:
    """ModelScope's own client, on a cache laid out as it lays one out."""
    pytest.importorskip("modelscope")
    folder = tmp_path / "models" / "Qwen--Qwen2-VL-0B" / "snapshots" / "master"
    write_tiny_checkpoint(folder, shards=2)
    call = "resolve_model('Qwen/Qwen2-VL-0B', 'modelscope')"
    code = f"from octavo.engine.config.hub import resolve_model; print({call})"
    environment = {"MODELSCOPE_CACHE": str(tmp_path), "HOME": str(tmp_path), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip().splitlines()[-1] == str(folder)


@pytest.mark.parametrize("package", ["huggingface_hub", "modelscope"])
def test_what_is_not_cached_is_downloaded(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local cache first, then the hub; weights in other formats are never asked for."""
    asked = []

    def snapshot_download(
        name: str, local_files_only: bool = False, allow_patterns: list[str] | None = None
    ) -> str:
        asked.append((name, local_files_only))
        assert allow_patterns and "*.bin" not in allow_patterns
        if local_files_only or name == "Qwen/None":
            raise ValueError("no such model\nand more")
        return str(write_tiny_checkpoint(tmp_path))

    fake = types.ModuleType(package)
    fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, fake)
    source = package.removesuffix("_hub")
    assert resolve_model("Qwen/Qwen2-VL-2B-Instruct", source) == tmp_path
    assert [local for _, local in asked] == [True, False]
    with pytest.raises(ConfigError, match=r": no such model$"):
        resolve_model("Qwen/None", source)


def test_other_sources_are_rejected() -> None:
    with pytest.raises(ConfigError, match="'ftp': must be one of huggingface, modelscope"):
        resolve_model("Qwen/Qwen2-VL-2B-Instruct", "ftp")
