"""Resources of each process of a server, from /proc and /metrics, and their growth."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.benchmarks.process_memory import tree

MODULES = (("engine.media.sandbox.child", "decoder"), ("engine.worker.worker", "worker"))
LASTING = ("server", "worker")  # roles of long-lived processes
METRIC = re.compile(r"^(octavo_[a-z_]+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)
KEPT = (
    "octavo_kv_cache_blocks",
    "octavo_encoder_cache_tokens",
    "octavo_requests_running",
    "octavo_requests_waiting",
    "octavo_worker_restarts_total",
)


@dataclass(frozen=True)
class ProcessSample:
    """Resources of one process; memory in bytes."""

    pid: int
    role: str  # server, worker, decoder, or the name of another helper's module
    resident: int
    anonymous: int
    num_descriptors: int
    num_threads: int


@dataclass(frozen=True)
class Sample:
    """Resources of all processes of a server at one time."""

    at: float  # seconds since the start
    processes: tuple[ProcessSample, ...]
    metrics: dict[str, float]
    num_cases: int = 0  # in a census: cases run until then

    def resident(self, role: str = "") -> int:
        """Return the resident bytes of a role, or of all processes if it is empty."""
        return sum(each.resident for each in self.processes if role in ("", each.role))

    @property
    def steady(self) -> float:
        """Resident bytes of the server, its workers and one helper process of each kind.

        The number of helpers varies with the load, as they are started and replaced.
        """
        helpers = [role for role in self.roles if role not in LASTING]
        means = (self.resident(role) / self.count(role) for role in helpers)
        return sum(map(self.resident, LASTING)) + sum(means)

    def num_descriptors(self, role: str) -> int:
        return sum(each.num_descriptors for each in self.processes if each.role == role)

    def num_threads(self, role: str) -> int:
        return sum(each.num_threads for each in self.processes if each.role == role)

    def count(self, role: str) -> int:
        return sum(each.role == role for each in self.processes)

    @property
    def roles(self) -> list[str]:
        return sorted({each.role for each in self.processes})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def take_sample(pid: int, began: float, metrics: dict[str, float]) -> Sample:
    """Sample the process and its descendants; `began` is a time of the monotonic clock."""
    found = [sample_process(each, each == pid) for each in tree(pid)]
    there = tuple(each for each in found if each is not None)
    return Sample(time.monotonic() - began, there, metrics)


def sample_process(pid: int, is_root: bool) -> ProcessSample | None:
    """Sample one process; return None if it has exited."""
    folder = Path(f"/proc/{pid}")
    try:
        status = (folder / "status").read_text()
        command = (folder / "cmdline").read_bytes().decode(errors="replace")
        num_descriptors = len(list((folder / "fd").iterdir()))
    except OSError:
        return None
    if "VmRSS:" not in status:  # a zombie
        return None
    sizes = {name: 1024 * int(_field(status, name)) for name in ("VmRSS", "RssAnon")}
    role = "server" if is_root else _role(command)
    num_threads = int(_field(status, "Threads"))
    return ProcessSample(pid, role, sizes["VmRSS"], sizes["RssAnon"], num_descriptors, num_threads)


def _field(status: str, name: str) -> str:
    return status.partition(f"{name}:")[2].split(maxsplit=1)[0]


def _role(command: str) -> str:
    """Return the role of a child of the server, by the module it runs."""
    for module, role in MODULES:
        if module in command:
            return role
    module = command.partition("\0-m\0")[2].partition("\0")[0]
    return module.rpartition(".")[2] or "other"


def read_metrics(http_address: str, api_key: str) -> dict[str, float]:
    """Return the metrics in `KEPT`, by name and labels."""
    asked = urllib.request.Request(
        f"http://{http_address}/metrics", headers={"authorization": f"Bearer {api_key}"}
    )
    with urllib.request.urlopen(asked, timeout=60) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in METRIC.findall(text) if name.startswith(KEPT)}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of y over x of the (x, y) `points`; 0 for fewer than two."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def growth(samples: Sequence[Sample], size: Callable[[Sample], float], since: float = 0.0) -> float:
    """Return the growth of `size` (in bytes) over time, in MB (1e6 bytes) per minute."""
    return slope([(each.at / 60, size(each) / 1e6) for each in samples if each.at >= since])
