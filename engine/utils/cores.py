"""The CPU cores that this process may use: fewer than the machine has where it is pinned to some,
or in a container with a limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of version 2, as a container sees it
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def num_cores() -> int:
    """How many; a limit of two and a half cores is three."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota())))


def cores_id() -> str:
    """Which: two processes of one network have the same exactly where they share their cores."""
    parts = [_text(BOOT_ID), ",".join(map(str, sorted(os.sched_getaffinity(0))))]
    if _quota() < math.inf:
        parts.append(str(CGROUP.stat().st_ino))  # no other container's
    return " ".join(parts)


def _quota() -> float:
    """Cores' worth of time that the container may use."""
    quota, _, period = _text(CGROUP / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:  # no such controller
        return ""
