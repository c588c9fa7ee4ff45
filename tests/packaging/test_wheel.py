"""The source distribution builds a wheel that serves outside of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import octavo

ROOT = Path(__file__).resolve().parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({out!r}))"


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel of a source tree, and return its path."""
    command = [sys.executable, "-c", BUILD.format(kind=kind, out=str(out))]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


def test_the_sdist_builds_a_wheel_that_serves(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    sdist = build("sdist", tree, tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    wheel = build("wheel", next((tmp_path / "unpacked").iterdir()), tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "octavo/engine/server/page/index.html" in names
    assert not [name for name in names if name.startswith(("octavo/tests/", "octavo/setup"))]
    assert any(name.startswith("octavo/kernels/native/_kernels") for name in names)
    serves_an_answer(site)


def serves_an_answer(site: Path) -> None:
    """Start `octavo serve` from the installed files and ask it with the installed client."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    where = [sys.executable, "-P", "-c", "import octavo; print(octavo.__file__)"]
    found = subprocess.run(where, env=env, cwd=site, capture_output=True, text=True)
    assert found.stdout.startswith(str(site)), found
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--port", "0"]
    with subprocess.Popen(command, env=env, cwd=site, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("ready grpc="), line
            address = line.split()[1].partition("=")[2]
            with octavo.Client(address) as client:
                deltas = list(client.chat([{"role": "user", "content": "Who are you?"}]))
            assert "Octavo" in "".join(delta.text for delta in deltas)
        finally:
            server.terminate()
    assert server.returncode == 0
