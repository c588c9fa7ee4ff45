"""Memory available to this process, within the limits of its cgroups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 uses a number near 2^63
# By cgroup version: files of limit and usage, and the memory.stat key of reclaimable page cache.
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@dataclass(frozen=True)
class Memory:
    bytes: int  # available
    total_bytes: int


def available_memory() -> Memory:
    """Return available and total memory without swap. Reclaimable page cache is available."""
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    available, total = found["MemAvailable"], found["MemTotal"]
    for folder, version in _cgroups():
        limit_name, used_name, cache_key = FILES[version]
        limit = _number(folder / limit_name)
        if limit is not None and limit < UNLIMITED:
            used = (_number(folder / used_name) or 0) - _stat(folder, cache_key)
            available = min(available, max(0, limit - max(0, used)))
            total = min(total, limit)
    return Memory(available, total)


def _cgroups() -> Iterator[tuple[Path, int]]:
    """Yield (folder, version) of this process's memory cgroups and their ancestors.

    The limits of all of them apply. A container sees its own cgroup as the root.
    """
    for line in _text(OWN_CGROUPS).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, version = CGROUP, 2
        elif "memory" in controllers.split(","):
            root, version = CGROUP / "memory", 1
        else:
            continue
        yield root, version
        at = root
        for part in Path(path).parts[1:]:
            at /= part
            yield at, version


def _stat(folder: Path, key: str) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None  # "max" means no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # controller not available
        return ""
