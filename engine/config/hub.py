"""Resolve a model name to a checkpoint folder, downloading it from a hub if necessary."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path

from ..errors import ConfigError
from .engine_config import EMBEDDED_MODEL
from .json_files import indexed_files

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # files to download
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SOURCES = {  # name: (client package, display name)
    "huggingface": ("huggingface_hub", "Hugging Face"),
    "modelscope": ("modelscope", "ModelScope"),
}


def resolve_model(name_or_path: str | Path | None, source: str = "huggingface") -> Path:
    """Return the checkpoint folder of a model.

    None is the embedded model. `owner/name` is looked up in the local cache of `source`
    ("huggingface" or "modelscope"), then downloaded with a progress bar. Raises `ConfigError` if
    the model is not found.
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
    """Return a folder of the hub client's cache, or download it with a progress bar."""
    package, hub = SOURCES[source]
    try:
        download = importlib.import_module(package).snapshot_download
    except ImportError:
        raise ConfigError(
            f"{name}: no such folder; to load it from {hub}, install {package}: "
            "pip install 'octavo[hub]'"
        ) from None
    with contextlib.suppress(Exception):  # not cached; the error type depends on the client
        cached = Path(download(name, local_files_only=True, allow_patterns=FILES))
        if is_complete(cached):
            return cached
    try:
        found = Path(download(name, allow_patterns=FILES))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name}: not a folder, not in the local cache, and not available from {hub}: {reason}"
        ) from None
    if not is_complete(found):  # Offline, the client returns an incomplete folder.
        raise ConfigError(
            f"{name}: {found} has only a part of the checkpoint, and the hub is offline; download "
            "it again"
        )
    return found


def is_complete(folder: Path) -> bool:
    """Return whether a cached folder has its config and every weight file in its index.

    After an interrupted download, the cache returns an incomplete folder.
    """
    if not (folder / "config.json").is_file():
        return False
    files = indexed_files(folder) or tuple(folder.glob("*.safetensors"))
    return bool(files) and all(file.is_file() for file in files)


def model_name(name_or_path: str | Path | None, folder: Path) -> str:
    """Return the name of a model for responses: its hub id, or the name of its folder.

    Local paths are not exposed to clients.
    """
    if name_or_path is None:
        return "octavo-embedded"
    name = str(name_or_path)
    return folder.resolve().name if Path(name).expanduser().is_dir() else name
