"""A checkpoint's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .config_error import ConfigError


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ConfigError(
            f"{path}: no such file; --model takes a Qwen2-VL checkpoint folder "
            "or a hub id such as Qwen/Qwen2-VL-2B-Instruct"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a JSON object, not {type(found).__name__}")
    return found
