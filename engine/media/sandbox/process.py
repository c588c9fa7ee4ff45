"""Engine-side handle of a decoder process: start, messages, limits, cancellation, end."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from threading import Lock
from typing import NoReturn

import numpy as np
from google.protobuf.message import DecodeError

from ....proto import media_pb2 as pb
from ...config.media_limits import MediaLimits
from ...utils.cores import num_cores
from ...utils.lifetime import disown_after_fork, start_tied
from ..decode.reader import Pixels

MODULE = "octavo.engine.media.sandbox.child"
START_SECONDS = 60.0  # timeout of starting and sending
PING_SECONDS = 5.0  # timeout of an idle process's answer
CANCEL_SECONDS = 0.5  # grace period for the current work after a cancellation
PACKET_BYTES = 256 * 1024  # more than a socket pair's maximum packet
MAX_SLOTS, SLOTS_BYTES = 4, 32 << 20  # maximum frames that a process decodes ahead
MIN_MEMORY = 8 << 20  # bytes; most images fit, so the memory is rarely replaced by a larger one
FILES_BESIDE = 32  # open files of a process in addition to the media files
# Prefixes of the variables that a process inherits; it must not see the rest, such as secrets.
KEPT_ENVIRONMENT = ("PYTHON", "LD_", "LC_", "LANG", "VIRTUAL_ENV")
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # no thread may start before the sandbox is applied
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",  # each arena reserves address space
    # Reuse the memory of one image for the next. Returning it to the kernel each time made
    # decoding 1.15 times as slow for 1080p images and 1.5 times for videos.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "PILLOW_BLOCKS_MAX": "4",  # of 16 MB
}


class DecoderStoppedError(Exception):
    """The process ended or sent an invalid message, and was killed."""


class StartCancelledError(Exception):
    """The request was cancelled before the process was ready. The process can be used later."""


class PixelMemory:
    """Shared memory of fixed size that a decoder process writes and this process reads."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.descriptor = os.memfd_create("octavo-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, num_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            self._map = mmap.mmap(self.descriptor, num_bytes, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self.descriptor)
            raise

    def copy(self, slot: int, height: int, width: int) -> Pixels:
        """Return a copy of a frame, uint8 [height, width, 3].

        The decoder cannot change the copy between hashing and encoding.
        """
        size = height * width * 3
        frame = np.frombuffer(self._map, np.uint8, size, slot * size)
        return frame.reshape(height, width, 3).copy()

    def close(self) -> None:
        os.close(self.descriptor)
        self._map.close()


class DecoderProcess:
    """A decoder process. It is started at once and is ready about a quarter of a second later."""

    def __init__(self, limits: MediaLimits) -> None:
        self._cpu_seconds = limits.media_timeout_s * num_cores()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _start(theirs.fileno(), self._cpu_seconds, limits)
        self._memory: PixelMemory | None = None
        disown_after_fork(self)
        self._is_ready = False
        self.sandbox = ""  # its restrictions, for the log; set once it is ready
        self._cancelled = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable: cancelled
        self._lock = Lock()
        self.open_readers: set[int] = set()
        self.num_readers = 0  # opened since the start
        self.is_idle = True  # no reply is outstanding
        self.is_cancelled = False  # the request that uses the process was cancelled
        self.is_killed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self.is_killed and self._process.poll() is None

    @property
    def resident_bytes(self) -> int:
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * mmap.PAGESIZE
        except OSError:  # the process ended
            return 0

    def await_ready(self) -> None:
        """Wait until the process has started.

        Raises `DecoderStoppedError` if it does not, and `StartCancelledError` after `cancel`.
        """
        if self._is_ready:
            return
        try:
            reply = self.receive(START_SECONDS)
        except TimeoutError:
            if self.is_cancelled:
                raise StartCancelledError from None
            self.fail("did not start")
        if not reply.HasField("ready"):
            self.fail("did not start")
        self.sandbox, self._is_ready = reply.ready.sandbox, True

    def answers(self) -> bool:
        """Return whether the process, which has started, responds to a message."""
        try:
            self.send(pb.Request(stop=pb.Stop()))
            return self.receive(PING_SECONDS).HasField("stopped")
        except (TimeoutError, DecoderStoppedError):
            return False

    def send(self, request: pb.Request, descriptors: tuple[int, ...] = ()) -> None:
        """Send a request with file descriptors. Raises `DecoderStoppedError`."""
        try:
            self._channel.settimeout(START_SECONDS)
            socket.send_fds(self._channel, [request.SerializeToString()], descriptors)
        except OSError:  # including a timeout
            self.fail("does not receive messages")

    def receive(self, seconds: float) -> pb.Reply:
        """Return the next reply.

        Raises `TimeoutError` if none comes in time or shortly after `cancel`, and
        `DecoderStoppedError` if the process ended or sent an invalid reply.
        """
        try:
            self._await_packet(seconds)
            data = self._channel.recv(PACKET_BYTES)  # drops any file descriptors of the packet
        except TimeoutError:
            raise
        except OSError:
            self.fail("ended")
        if not data:
            self.fail("ended")
        try:
            return pb.Reply.FromString(data)
        except DecodeError:
            self.fail("sent an invalid reply")

    def _await_packet(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._cancelled, select.POLLIN)
        ready = dict(poll.poll(max(seconds, 1e-3) * 1000))
        if list(ready) == [self._cancelled]:
            poll.unregister(self._cancelled)
            left = min(deadline - time.monotonic(), CANCEL_SECONDS)
            ready = dict(poll.poll(max(left, 1e-3) * 1000))
        if self._channel.fileno() not in ready:
            raise TimeoutError

    def cancel(self) -> None:
        """Interrupt the request that uses the process. Callable by any thread.

        A thread in `receive` gives up after `CANCEL_SECONDS`, and kills the process only if its
        work has not ended by then.
        """
        with self._lock:
            self.is_cancelled = True
            if not self.is_killed:
                os.eventfd_write(self._cancelled, 1)

    def end_request(self) -> None:
        """Clear a cancellation, which must not affect the next request."""
        with self._lock:
            if self.is_cancelled and not self.is_killed:
                os.eventfd_read(self._cancelled)
            self.is_cancelled = False

    def allow_cpu(self) -> None:
        """Allow CPU time for one more file; the kernel kills the process when it is used up."""
        try:
            most = self._used_cpu_seconds() + self._cpu_seconds
            hard = resource.prlimit(self.pid, resource.RLIMIT_CPU)[1]
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (most, hard))
        except OSError:  # the process ended, as the next request to it shows
            pass

    def allow_memory(self, num_bytes: int) -> None:
        """Limit the address space; allocations beyond it fail."""
        if not self.is_alive:
            return
        try:
            hard = resource.prlimit(self.pid, resource.RLIMIT_AS)[1]
            soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
            resource.prlimit(self.pid, resource.RLIMIT_AS, (soft, hard))
        except OSError:  # the process ended, as the next request to it shows
            pass

    def _used_cpu_seconds(self) -> int:
        clock = (~self.pid << 3) | 2  # the process's CPU clock, as in clock_getcpuclockid(3)
        return int(time.clock_gettime(clock)) + 1

    def pixel_memory(self, frame_bytes: int, num_frames: int) -> tuple[PixelMemory, int, bool]:
        """Return (memory, number of frame slots, whether the memory is new to the process)."""
        wanted = min(num_frames, MAX_SLOTS, max(1, SLOTS_BYTES // frame_bytes))
        memory = self._memory
        is_new = memory is None or memory.num_bytes < wanted * frame_bytes
        if memory is None or is_new:
            if memory is not None:
                memory.close()
            memory = self._memory = PixelMemory(max(MIN_MEMORY, wanted * frame_bytes))
        return memory, min(num_frames, MAX_SLOTS, memory.num_bytes // frame_bytes), is_new

    def disown(self, cause: str) -> None:
        """Close this process's copies of the socket and the pipe. Called in a forked process.

        The decoder ends when all copies are closed, so a fork must not keep them open.
        """
        self.is_killed = True
        self._channel.close()
        if self._process.stdin:
            self._process.stdin.close()

    def fail(self, what: str) -> NoReturn:
        """Kill the process and raise `DecoderStoppedError`."""
        self.kill()
        raise DecoderStoppedError(f"the decoder {what}")

    def terminate(self) -> None:
        """Kill the process while another thread may use it; that thread calls `kill` later."""
        self._process.kill()

    def kill(self) -> None:
        """Kill the process and release its resources. It has no state to save."""
        with self._lock:
            if self.is_killed:
                return
            self.is_killed = True
            os.close(self._cancelled)
        self._process.kill()
        self._process.wait()
        self._channel.close()
        if self._process.stdin:
            self._process.stdin.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def _start(socket_number: int, cpu_seconds: int, limits: MediaLimits) -> subprocess.Popen[bytes]:
    """Start the process. `-P` keeps our folders (`kernels`, `proto`) from shadowing packages."""
    env = {name: text for name, text in os.environ.items() if name.startswith(KEPT_ENVIRONMENT)}
    given = {
        "socket": socket_number,
        "memory-bytes": limits.decoder_memory_bytes,
        "cpu-seconds": cpu_seconds,
        "files": limits.max_media_items + FILES_BESIDE,
    }
    command = [sys.executable, "-P", "-m", MODULE]
    return start_tied(
        [*command, *(part for name, value in given.items() for part in (f"--{name}", str(value)))],
        signal.SIGKILL,
        stdout=subprocess.DEVNULL,
        env={**env, **ENVIRONMENT},
        pass_fds=(socket_number,),
        start_new_session=True,  # Ctrl-C in a terminal must reach only the engine
    )
