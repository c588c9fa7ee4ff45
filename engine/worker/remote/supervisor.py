"""Supervisor of `octavo worker`: keep one worker process running at an address."""

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
MIN_UPTIME = 10.0  # seconds; a worker that fails earlier counts as failed to start
HEARTBEAT_TIMEOUT = 30.0  # seconds without a heartbeat after which a worker counts as hung
GRACE = 5.0  # seconds for the worker to exit when asked
POLL_INTERVAL = 0.5  # seconds between two checks
BACKOFF = (0.0, 1.0, 2.0, 5.0, 10.0)  # seconds before the next start, by consecutive failures


def free_address(address: Address) -> Address:
    """Return the address, with a free port if its port is 0.

    Raises `ConfigError` if the address cannot be bound.
    """
    try:
        family, kind, protocol, _, bind_address = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(bind_address)
            return Address(address.host, probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"--listen {address}: {error.strerror or error}") from None


class Supervisor:
    """Starts a worker and restarts it whenever it exits, until it is asked to stop."""

    def __init__(
        self, address: Address, rank: int, local_rank: int, model: Path, tls: Path | None
    ) -> None:
        """Validate the options. Raises `ConfigError` if a worker could not serve with them."""
        check_exposure(address, tls)
        if tls is not None:
            group_tls(tls)  # raises `ConfigError` for unreadable files, as does the next line
        ModelConfig.from_dir(model)
        self._command = _command(free_address(address), rank, local_rank, model, tls)
        # time.monotonic() of the stop signal, 0: not yet. Set by the signal handler, which must not
        # wait for a lock.
        self._stopped_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures = 0
        while not self._is_stopped_within(BACKOFF[min(failures, len(BACKOFF) - 1)]):
            start_time = time.monotonic()
            status = self._run_one()
            if self._stopped_at:
                break
            has_failed = status != 0 and time.monotonic() - start_time < MIN_UPTIME
            failures = failures + 1 if has_failed else 0
            log.info("the worker exited with status %d; restarting it", status)
        return 0

    def _is_stopped_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self._stopped_at and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL_INTERVAL, left))
        return self._stopped_at > 0

    def _run_one(self) -> int:
        beats, beat = os.pipe()
        # With its own session, Ctrl-C in a terminal reaches only the supervisor.
        process = self._process = subprocess.Popen(
            [*self._command, "--beat", str(beat)],
            stdin=subprocess.PIPE,
            env=_env(),
            start_new_session=True,
            pass_fds=[beat],
        )
        os.close(beat)
        if self._stopped_at:  # the signal came before `_process` was set
            self._close()
        try:
            return self._watch(process, beats)
        finally:
            os.close(beats)

    def _watch(self, process: subprocess.Popen[bytes], beats: int) -> int:
        """Wait for the exit and return the status; kill the worker if its heartbeat stops."""
        last_beat = time.monotonic()
        while process.poll() is None:
            if select.select([beats], [], [], POLL_INTERVAL)[0]:
                if not os.read(beats, 4096):
                    return process.wait()
                last_beat = time.monotonic()
            timeout = GRACE if self._stopped_at else HEARTBEAT_TIMEOUT
            if time.monotonic() - (self._stopped_at or last_beat) > timeout:
                log.warning("the worker does not respond; killing it")
                process.kill()
                return process.wait()
        return process.returncode

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_at = time.monotonic()
        self._close()

    def _close(self) -> None:
        """Close the worker's standard input, which makes it exit."""
        process = self._process
        if process is not None and process.stdin and not process.stdin.closed:
            process.stdin.close()


def _env() -> dict[str, str]:
    """Return the worker's environment.

    OMP_NUM_THREADS=1, the default of torchrun, is removed: the engine sets the number of threads
    when it knows how many workers share the cores.
    """
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
