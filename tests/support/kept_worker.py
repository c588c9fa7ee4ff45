"""An `octavo worker` process for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from octavo.tests.support.fork_server import popen

READY = re.compile(r"ready worker=(\S+) rank=(\d+) pid=(\d+)")


@dataclass
class Kept:
    """An `octavo worker` process, with the address and pid of its latest ready line."""

    process: subprocess.Popen[str]
    address: str = ""
    pid: int = 0

    def read(self) -> None:
        """Wait until the worker is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = READY.fullmatch(line.strip())
        assert match is not None, line
        self.address, self.pid = match[1], int(match[3])

    def follow(self) -> None:
        """Keep reading ready lines in the background, so that `pid` stays up to date."""

        def run() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if match := READY.fullmatch(line.strip()):
                    self.pid = int(match[3])

        threading.Thread(target=run, daemon=True).start()

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def keep(
    model: Path, *args: str, env: dict[str, str] | None = None, within: tuple[str, ...] = ()
) -> Kept:
    """Start an `octavo worker`; `within` prefixes the command, e.g. `ip netns exec NAME`."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "octavo.engine.cli.main",
        "worker",
        "--model",
        str(model),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return Kept(
        popen([*within, *command, *args], stdout=subprocess.PIPE, text=True, env=environment)
    )
