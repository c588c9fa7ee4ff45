"""Start servers and workers as forks of a process that has already imported torch.

`octavo serve` and its workers spend most of their start-up on imports. The tests start hundreds of
them, so each pytest process has one fork server, which has no threads and makes no gRPC calls. Its
forks run the product's `main`; products never do this. `install` makes the engine start workers
through `popen`, and tests call `popen` to start commands.

A request is a message on a Unix socket with the descriptors to pass on. The server answers with the
pid and, when the process has ended, its exit status.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from octavo.benchmarks.fakes import tiny_server
from octavo.engine.cli import main as cli
from octavo.engine.utils import failpoints, lifetime
from octavo.engine.worker import worker
from octavo.engine.worker.process import KERNEL_CACHES, SPIN_COUNT
from octavo.engine.worker.remote import supervisor
from octavo.engine.worker.remote import worker as remote_worker

PREFIX = [sys.executable, "-P", "-m"]
MAINS: dict[str, Callable[[], object]] = {
    module.__name__: module.main for module in (cli, worker, remote_worker)
}
IMPORTED = (
    "torch.distributed",
    "octavo.engine.cli.serve",
    "octavo.engine.runner.loader",
    "octavo.engine.runner.model_runner",
    "octavo.engine.server.http_api.server",
)
# Variables that a fork takes over although modules are imported already.
TAKEN_OVER = {failpoints.VARIABLE, "GOMP_SPINCOUNT", "GLOO_SOCKET_IFNAME", "OCTAVO_LOG_FORMAT"}
TAKEN_OVER |= {*KERNEL_CACHES, "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"}


class ForkedProcess:
    """A fork, with the part of `subprocess.Popen` that the engine and the tests use."""

    def __init__(self, pid: int, reports: socket.socket, stdin: Any, stdout: Any) -> None:
        self.pid, self._reports, self.stdin, self.stdout = pid, reports, stdin, stdout
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._reports], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(PREFIX, timeout or 0)
            self.returncode = int(self._reports.recv(16))
            self._reports.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


_address: Any = None  # of this process's fork server
_base: dict[str, str] = {}  # its environment, without the variables that forks take over
_started: list[subprocess.Popen[bytes]] = []  # its standard input closes when this process ends


def install() -> None:
    """Make the engine and `tiny_server` of this process start their children with `popen`."""
    global _base
    _base = _without_taken_over(os.environ)
    namespace = types.SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    for module in (lifetime, supervisor, tiny_server):
        module.subprocess = namespace  # type: ignore[attr-defined]


def popen(
    command: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: Any = None,
    text: bool = False,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    pass_fds: Sequence[int] = (),
) -> Any:
    """Replace `subprocess.Popen`; fork if the command and its environment allow it."""
    env = dict(os.environ if env is None else env)
    is_known = [*command[:3]] == PREFIX and command[3] in MAINS
    if not (is_known and _can_fork(env)):
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            env=env,
            start_new_session=start_new_session,
            pass_fds=pass_fds,
        )
    files, kept = [0, 1, 2], {}
    for number, given in enumerate((stdin, stdout, stderr)):
        if given == subprocess.PIPE:
            ends = os.pipe()
            files[number], kept[number] = ends if number == 0 else ends[::-1]
        elif given is not None:
            files[number] = given if isinstance(given, int) else given.fileno()
    message = [command[3], [*command[4:]], env, os.getcwd(), start_new_session, [*pass_fds]]
    reports = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reports.connect(_address)
    socket.send_fds(reports, [json.dumps(message).encode()], [*files, *pass_fds])
    pid = int(reports.recv(16))
    for number in kept:
        os.close(files[number])
    mode = "" if text else "b"
    buffering = -1 if text else 0
    ours = {n: os.fdopen(end, ("r" if n else "w") + mode, buffering) for n, end in kept.items()}
    return ForkedProcess(pid, reports, ours.get(0), ours.get(1))


def _can_fork(env: Mapping[str, str]) -> bool:
    """Return whether a fork can have this environment. Starts the server on the first call."""
    global _address
    if _without_taken_over(env) != _base:
        return False
    if _address is None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("")  # the kernel chooses an abstract address
            listener.listen(64)
            _address = listener.getsockname()
            command = [*PREFIX, __spec__.name, str(listener.fileno())]
            env = {**_base, **KERNEL_CACHES, "GOMP_SPINCOUNT": SPIN_COUNT}
            files = [listener.fileno()]
            started = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, pass_fds=files, start_new_session=True
            )
            _started.append(started)
    return True


def _without_taken_over(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in TAKEN_OVER}


def serve(listener: socket.socket) -> Callable[[], object]:
    """Fork until standard input closes. Returns in forks only, what a fork has to do."""
    children: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        ready = select.select([listener, woken, 0], [], [])[0]
        if 0 in ready:
            sys.exit()
        if woken in ready:
            os.read(woken, 1 << 12)
            _report_ended(children)
        if listener in ready:
            reports = listener.accept()[0]
            message, files, _, _ = socket.recv_fds(reports, 1 << 18, 64)
            pid = os.fork()
            if pid == 0:
                for connection in (listener, reports, *children.values()):
                    connection.close()
                os.close(woken)
                signal.set_wakeup_fd(-1)
                os.close(wake)
                return lambda: _run(*json.loads(message), files)
            for file in files:
                os.close(file)
            children[pid] = reports
            reports.send(str(pid).encode())


def _report_ended(children: dict[int, socket.socket]) -> None:
    """Send the exit statuses of ended children."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as reports, suppress(OSError):
            reports.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(
    module: str,
    arguments: list[str],
    env: dict[str, str],
    folder: str,
    has_session: bool,
    numbers: list[int],
    files: list[int],
) -> object:
    """Become the process that was asked for, and run its `main`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if has_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    failpoints._RULES = failpoints.parse(env.get(failpoints.VARIABLE, ""))
    high = max([*numbers, *files]) + 1  # so that no number is overwritten before it is moved
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, high) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip([0, 1, 2, *numbers], moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.argv = [module, *arguments]
    return MAINS[module]()


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("the imports started threads, which forks would not have")
    with socket.socket(fileno=int(sys.argv[1])) as server:
        _address = server.getsockname()
        install()
        run = serve(server)
    run()
