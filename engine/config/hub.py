"""Finds a checkpoint folder: the embedded one, a folder, or a hub's, downloaded if need be."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path

from ..errors import ConfigError
from .engine_config import EMBEDDED_MODEL
from .json_files import indexed_files

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # no other format is read
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SOURCES = {  # name: its client's package, and what people call it
    "huggingface": ("huggingface_hub", "Hugging Face"),
    "modelscope": ("modelscope", "ModelScope"),
}


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
    return _from_hub(name, source)


def _from_hub(name: str, source: str) -> Path:
    """From the cache of the hub's own client, else downloaded by it; it shows a progress bar."""
    package, hub = SOURCES[source]
    try:
        download = importlib.import_module(package).snapshot_download
    except ImportError:
        raise ConfigError(
            f"{name}: no such folder; to look it up in a hub, {package} is needed: "
            "pip install 'octavo[hub]'"
        ) from None
    with contextlib.suppress(Exception):  # not cached; the clients' errors differ by release
        cached = Path(download(name, local_files_only=True, allow_patterns=FILES))
        if is_complete(cached):
            return cached
    try:
        found = Path(download(name, allow_patterns=FILES))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name}: neither a folder, nor in the local cache, nor to be had from {hub}: {reason}"
        ) from None
    if not is_complete(found):  # offline, the client hands over what part it has
        raise ConfigError(f"{name}: {found} holds a part of the checkpoint, and the hub is offline")
    return found


def is_complete(folder: Path) -> bool:
    """Whether a cached folder has its config and every weight file that its index names.

    An interrupted download leaves a folder that the cache calls found.
    """
    if not (folder / "config.json").is_file():
        return False
    files = indexed_files(folder) or tuple(folder.glob("*.safetensors"))
    return bool(files) and all(file.is_file() for file in files)


def model_name(name_or_path: str | Path | None, folder: Path) -> str:
    """What callers know a model by, whose checkpoint is in `folder`: its id on the hub, or the
    folder's name; no path of this machine."""
    if name_or_path is None:
        return "octavo-embedded"
    name = str(name_or_path)
    return folder.resolve().name if Path(name).expanduser().is_dir() else name
