"""A checkpoint's files: what they may be, and its JSON."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from .config_error import ConfigError

MAX_JSON_BYTES = 64 << 20  # the largest of a real checkpoint, its tokenizer, has some 11 MB
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: True, "a device"),
)


def check_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise `ConfigError` for what is no regular file, which might never end, or is too large;
    FileNotFoundError for what is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {text}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next(name for test, name in KINDS if test(found.st_mode))
        raise ConfigError(f"{path}: is {kind}; it must be a regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise ConfigError(f"{path}: has {found.st_size} bytes; at most {max_bytes} are read")


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """The object in a JSON file; empty where the file may be missing and is. Raises
    `ConfigError`."""
    try:
        check_file(path, MAX_JSON_BYTES)
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ConfigError(
            f"{path}: no such file; --model takes a Qwen2-VL checkpoint folder "
            "or a hub id such as Qwen/Qwen2-VL-2B-Instruct"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: not readable as JSON: it is nested too deeply") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a JSON object, not {type(found).__name__}")
    return found
