"""Finds a checkpoint folder: the embedded one, a folder, or a hub's, downloaded if need be."""

from __future__ import annotations

import re
from pathlib import Path

from .config import EMBEDDED_MODEL, ConfigError, read_json

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # no other format is read
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SOURCES = ("huggingface", "modelscope")


def resolve_model(name_or_path: str | Path | None, source: str = "huggingface") -> Path:
    """The checkpoint folder behind what a user calls a model.

    None is the embedded model; a folder is itself; `owner/name` is looked up in the local cache of
    `source` ("huggingface" or "modelscope"), then downloaded with a progress bar. Raises
    ConfigError where nothing is found, with what to do.
    """
    if source not in SOURCES:
        raise ConfigError(f"model source {source!r}: must be one of {', '.join(SOURCES)}")
    if name_or_path is None:
        return EMBEDDED_MODEL
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"{name}: no such folder, and not a hub id such as Qwen/Qwen2-VL-2B-Instruct"
        )
    return _from_modelscope(name) if source == "modelscope" else _from_huggingface(name)


def _from_huggingface(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(_needs_extra(name, "huggingface_hub")) from None
    try:
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=FILES))
        if is_complete(cached):
            return cached
    except Exception:  # not in the cache; the hub's own error types differ between its releases
        pass
    try:
        found = Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:
        raise ConfigError(_not_found(name, "Hugging Face", error)) from None
    if not is_complete(found):  # offline, the client hands over what part it has
        raise ConfigError(f"{name}: {found} holds a part of the checkpoint, and the hub is offline")
    return found


def _from_modelscope(name: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ConfigError(_needs_extra(name, "modelscope")) from None
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))  # looks in its cache first
    except Exception as error:
        raise ConfigError(_not_found(name, "ModelScope", error)) from None


def is_complete(folder: Path) -> bool:
    """Whether a cached folder has its config and every weight file that its index names.

    An interrupted download leaves a folder that the cache calls found.
    """
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    names = read_json(index).get("weight_map", {}).values()
    return all((folder / name).is_file() for name in set(names))


def _needs_extra(name: str, package: str) -> str:
    return (
        f"{name}: no such folder; to look it up in a hub, {package} is needed: "
        "pip install 'octavo[hub]'"
    )


def _not_found(name: str, hub: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"{name}: neither a folder, nor in the local cache, nor to be had from {hub}: "
        f"{reason[0] if reason else type(error).__name__}"
    )
