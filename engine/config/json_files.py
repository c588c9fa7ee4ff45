"""Read text and JSON files of a checkpoint, which is untrusted.

Files are limited in size. Pipes and devices, which could block forever, are rejected.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ConfigError

MAX_JSON_BYTES = 64 << 20  # for weight indexes and configurations
WEIGHT_INDEX = "model.safetensors.index.json"


def check_regular_file(path: Path) -> int:
    """Return the size of a file in bytes. Symbolic links are followed.

    Raises `FileNotFoundError`, and `ConfigError` for a folder, pipe, socket or device.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: null byte in the name
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: is not a regular file; replace it with the checkpoint's file")
    return found.st_size


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Read a UTF-8 text file. Raises `FileNotFoundError` or `ConfigError`."""
    check_regular_file(path)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise ConfigError(f"{path}: is larger than the limit of {max_bytes:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from None


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Read a JSON object; {} for a missing file with `missing_ok`. Raises `ConfigError`."""
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ConfigError(
            f"{path}: no such file; --model takes a Qwen2-VL checkpoint folder "
            "or a hub id such as Qwen/Qwen2-VL-2B-Instruct"
        ) from None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a JSON object, not {type(found).__name__}")
    return found


def indexed_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files in a checkpoint's index; () without an index.

    Raises `ConfigError` for a name that is not a safetensors file inside the folder. Symbolic links
    may point outside, as in the caches of hub clients.
    """
    path = folder / WEIGHT_INDEX
    raw = read_json(path, missing_ok=True)
    if not raw and not path.exists():
        return ()
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: weight_map must map tensor names to files")
    for name in weight_map.values():
        if not _is_inside(name):
            raise ConfigError(
                f"{path}: weight_map names {str(name)[:200]!r}; "
                "must be a .safetensors file inside the checkpoint folder"
            )
    return tuple(folder / name for name in sorted(set(weight_map.values())))


def _is_inside(name: Any) -> bool:
    if not isinstance(name, str) or "\0" in name or not name.endswith(".safetensors"):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
