"""CPU cores available to a process, and their distribution among ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.engine.utils import cores
from octavo.engine.utils.cores import cores_id, num_cores
from octavo.engine.worker import process


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (None, 8),  # no cgroup v2
        ("max 100000\n", 8),
        ("400000 100000\n", 4),
        ("250000 100000\n", 3),
        ("10000 100000\n", 1),
        ("6400000 100000\n", 8),  # more than the machine has
        ("what ever\n", 8),
        ("\n", 8),
    ],
)
def test_cgroup_limit_reduces_num_cores(cgroup: Path, text: str | None, count: int) -> None:
    if text is not None:
        cgroup.write_text(text)
    assert num_cores() == count


def test_affinity_reduces_num_cores() -> None:
    """Pin a real process."""
    one = min(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from octavo.engine.utils.cores import num_cores; print(num_cores())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["1"], done.stderr


def test_cores_id_identifies_shared_cores(
    cgroup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes with the same cores of a machine share an id, unless each has its own limit."""
    plain = cores_id()
    assert cores_id() == plain
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert cores_id() != plain
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    cgroup.write_text("200000 100000\n")
    limited = cores_id()
    other = tmp_path / "other"
    other.mkdir()
    (other / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr(cores, "CGROUP", other)
    assert len({plain, limited, cores_id()}) == 3
    monkeypatch.setattr(cores, "BOOT_ID", cgroup)
    assert cores_id() not in (plain, limited)


def test_local_ranks_share_the_available_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Use the container's cores, not the machine's: 4 of 64 cores must not start 64 threads."""
    started: list[dict[str, str]] = []
    monkeypatch.setattr(process, "start_tied", lambda *_, env, **__: started.append(env))
    monkeypatch.setattr(process, "num_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for num_ranks in (1, 2, 8):
        process._start(tmp_path / "socket", num_ranks, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's setting takes precedence
    process._start(tmp_path / "socket", 2, 0)
    assert [env["OMP_NUM_THREADS"] for env in started] == ["4", "2", "1", "3"]


@pytest.mark.parametrize(
    ("num_sharing", "set_by_user", "expected"), [(0, "", 1), (1, "", 6), (2, "", 3), (2, "1", 1)]
)
def test_remote_rank_takes_its_share(num_sharing: int, set_by_user: str, expected: int) -> None:
    """The limit holds in threads started later and in our kernels, which ask torch."""
    script = (
        "import threading, torch\n"
        "from octavo.engine.worker import worker\n"
        "worker.num_cores = lambda: 6\n"
        f"worker._share_cores({num_sharing})\n"
        "late = threading.Thread(target=lambda: print(torch.get_num_threads()))\n"
        "late.start(), late.join()"
    )
    env = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    if set_by_user or num_sharing == 0:
        env["OMP_NUM_THREADS"] = set_by_user or "1"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, env=env
    )
    assert done.stdout.split() == [str(expected)], done.stderr
