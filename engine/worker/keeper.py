"""`octavo worker`: keeps one worker running at an address, engine after engine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from ..config import ConfigError
from ..tls import group_tls
from .address import Address
from .fingerprint import fingerprint
from .process import worker_env
from .remote_worker import check_exposure

log = logging.getLogger("octavo.worker")

MODULE = "octavo.engine.worker.remote_worker"
SOON = 10.0  # seconds; a worker that ends with a fault before has failed to start
PAUSES = (0.0, 1.0, 2.0, 5.0, 10.0)  # seconds before the next start, by failures in a row


def free_address(address: Address) -> Address:
    """With a port that was free a moment ago, where it is 0. Raises `ConfigError` where nothing can
    listen there."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            return Address(address.host, probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"--listen {address}: {error.strerror or error}") from None


class Keeper:
    """Starts a worker, and the next when it has ended, until it is told to stop."""

    def __init__(
        self, address: Address, rank: int, local_rank: int, model: Path, tls: Path | None
    ) -> None:
        """Raises `ConfigError` for what no worker could serve."""
        check_exposure(address, tls)
        if tls is not None:
            group_tls(tls)  # they can be read,
        fingerprint(model)  # and this
        self._command = _command(free_address(address), rank, local_rank, model, tls)
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Until SIGTERM or SIGINT. The exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures = 0
        while not self._stopped.wait(PAUSES[min(failures, len(PAUSES) - 1)]):
            began = time.monotonic()
            status = self._run_one()
            if self._stopped.is_set():
                break
            is_fault = status != 0 and time.monotonic() - began < SOON
            failures = failures + 1 if is_fault else 0
            log.info("the worker has ended with status %d; it is started anew", status)
        return 0

    def _run_one(self) -> int:
        env = worker_env(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        # Its own session: Ctrl-C in a terminal reaches the keeper alone.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, env=env, start_new_session=True
        )
        if self._stopped.is_set():  # between the two
            self._close()
        return self._process.wait()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped.set()
        self._close()

    def _close(self) -> None:
        """Closes the pipe whose end the worker waits for."""
        process = self._process
        if process is not None and process.stdin and not process.stdin.closed:
            process.stdin.close()


def _command(
    address: Address, rank: int, local_rank: int, model: Path, tls: Path | None
) -> list[str]:
    command = [sys.executable, "-P", "-m", MODULE, "--listen", str(address)]
    command += ["--rank", str(rank), "--local-rank", str(local_rank), "--model", str(model)]
    if tls is not None:
        command += ["--tls", str(tls)]
    return command
