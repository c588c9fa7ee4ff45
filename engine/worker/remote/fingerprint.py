"""Fingerprint a checkpoint without reading it completely."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ...config.engine_config import ModelConfig, PreprocessConfig
from ...errors import ConfigError

SAMPLE = 4096  # bytes read at the start, the middle and the end of each tensor
MAX_HEADER = 100 << 20  # bytes; the maximum of the safetensors format


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 of the configuration, all tensors' names, types, shapes, and data samples.

    Fine-tuned weights have another fingerprint, a copy has the same. The distribution of tensors
    over files and the formatting of JSON files have no effect. Raises `ConfigError` if a file
    cannot be read.
    """
    from ...runner.loader import checkpoint_files

    digest = hashlib.sha256()
    for part in (ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)):
        digest.update(repr(part).encode())
    for entry in sorted(entry for file in checkpoint_files(folder) for entry in _tensors(file)):
        digest.update(entry)
    return digest.hexdigest()


def stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, mtime (ns) and size of all files, to detect changes. Raises `ConfigError`."""
    try:
        files = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
        found = sorted((file.name, file.stat()) for file in files)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in found)


def _tensors(path: Path) -> Iterator[bytes]:
    """Yield a description of each tensor in a file, for hashing."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, MAX_HEADER)))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                sample = hashlib.sha256()
                for at in (start, (start + end) // 2, max(start, end - SAMPLE)):
                    file.seek(8 + size + at)
                    sample.update(file.read(min(SAMPLE, end - at)))
                shape = [name, entry["dtype"], entry["shape"]]
                yield json.dumps(shape).encode() + sample.digest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors: {error}") from None
