"""CPU cores available to this process, considering its affinity and its container's limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # cgroup v2, as seen in a container
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def num_cores() -> int:
    """Return the number of available cores; a fractional limit is rounded up."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota())))


def cores_id() -> str:
    """Return an identifier of this process's CPU set, equal iff two processes share cores."""
    parts = [_text(BOOT_ID), ",".join(map(str, sorted(os.sched_getaffinity(0))))]
    if _quota() < math.inf:
        parts.append(str(CGROUP.stat().st_ino))  # unique per container
    return " ".join(parts)


def _quota() -> float:
    """Return the container's CPU limit in cores; infinity without a limit."""
    quota, _, period = _text(CGROUP / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:  # controller not available
        return ""
