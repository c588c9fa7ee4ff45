"""`octavo worker`: keeps one worker running at an address, engine after engine."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from ...config.engine_config import ModelConfig
from ...errors import ConfigError
from ...utils.tls import group_tls
from ..process import KERNEL_CACHES, SPIN_COUNT
from .address import Address
from .worker import check_exposure

log = logging.getLogger("octavo.worker")

MODULE = "octavo.engine.worker.remote.worker"
MIN_UPTIME = 10.0  # seconds; a worker that ends with a fault before has failed to start
HEARTBEAT_TIMEOUT = 30.0  # seconds without a beat after which a worker is taken to hang
GRACE = 5.0  # seconds for it to end when asked
POLL_INTERVAL = 0.5  # seconds between two looks
BACKOFF = (0.0, 1.0, 2.0, 5.0, 10.0)  # seconds before the next start, by failures in a row


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


class Supervisor:
    """Starts a worker, and the next when it has ended, until it is told to stop."""

    def __init__(
        self, address: Address, rank: int, local_rank: int, model: Path, tls: Path | None
    ) -> None:
        """Raises `ConfigError` for what no worker could serve."""
        check_exposure(address, tls)
        if tls is not None:
            group_tls(tls)  # they can be read,
        ModelConfig.from_dir(model)  # and this
        self._command = _command(free_address(address), rank, local_rank, model, tls)
        # By a signal's handler, which must not wait for a lock: when, on the monotonic clock.
        self._stopped_at = 0.0  # 0: not yet
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Until SIGTERM or SIGINT. The exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures = 0
        while not self._is_stopped_within(BACKOFF[min(failures, len(BACKOFF) - 1)]):
            began = time.monotonic()
            status = self._run_one()
            if self._stopped_at:
                break
            is_fault = status != 0 and time.monotonic() - began < MIN_UPTIME
            failures = failures + 1 if is_fault else 0
            log.info("the worker has ended with status %d; it is started anew", status)
        return 0

    def _is_stopped_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self._stopped_at and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL_INTERVAL, left))
        return self._stopped_at > 0

    def _run_one(self) -> int:
        beats, beat = os.pipe()
        # Its own session: Ctrl-C in a terminal reaches the keeper alone.
        process = self._process = subprocess.Popen(
            [*self._command, "--beat", str(beat)],
            stdin=subprocess.PIPE,
            env=_env(),
            start_new_session=True,
            pass_fds=[beat],
        )
        os.close(beat)
        if self._stopped_at:  # between the two
            self._close()
        try:
            return self._watch(process, beats)
        finally:
            os.close(beats)

    def _watch(self, process: subprocess.Popen[bytes], beats: int) -> int:
        """Its status once it has ended. One that hangs is killed: it ends for nobody else."""
        heard = time.monotonic()
        while process.poll() is None:
            if select.select([beats], [], [], POLL_INTERVAL)[0]:
                if not os.read(beats, 4096):
                    return process.wait()
                heard = time.monotonic()
            patience = GRACE if self._stopped_at else HEARTBEAT_TIMEOUT
            if time.monotonic() - (self._stopped_at or heard) > patience:
                log.warning("the worker does not answer and is killed")
                process.kill()
                return process.wait()
        return process.returncode

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_at = time.monotonic()
        self._close()

    def _close(self) -> None:
        """Closes the pipe whose end the worker waits for."""
        process = self._process
        if process is not None and process.stdin and not process.stdin.closed:
            process.stdin.close()


def _env() -> dict[str, str]:
    """Of the worker, whose engine knows how many share its cores: the number of threads waits for
    it. torchrun gives each process one where nobody has said how many."""
    env = {"GOMP_SPINCOUNT": SPIN_COUNT, **KERNEL_CACHES, **os.environ}
    if "TORCHELASTIC_RUN_ID" in env and env.get("OMP_NUM_THREADS") == "1":
        del env["OMP_NUM_THREADS"]
    return env


def _command(
    address: Address, rank: int, local_rank: int, model: Path, tls: Path | None
) -> list[str]:
    command = [sys.executable, "-P", "-m", MODULE, "--listen", str(address)]
    command += ["--rank", str(rank), "--local-rank", str(local_rank), "--model", str(model)]
    if tls is not None:
        command += ["--tls", str(tls)]
    return command
