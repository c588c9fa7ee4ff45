"""A decoder process as the engine sees it: started, asked, watched, ended."""

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
START_SECONDS = 60.0
PING_SECONDS = 5.0  # for an idle process to answer
CANCEL_SECONDS = 0.5  # for work in flight to end once its request was cancelled
PACKET_BYTES = 256 * 1024  # more than a socket pair takes in one
MAX_SLOTS, SLOTS_BYTES = 4, 32 << 20  # frames that a process may be ahead by
MIN_MEMORY = 8 << 20  # bytes: that most images fit, so that it is made once
FILES_BESIDE = 32  # open in a process beside those that it decodes
# Its own: it must not see what else the engine's environment holds.
KEPT_ENVIRONMENT = ("PYTHON", "LD_", "LC_", "LANG", "VIRTUAL_ENV")
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # no thread before the sandbox
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",  # heaps take address space
    # Memory of one image is kept for the next: to have it from the kernel and clear it each time
    # made decoding at 1080p 1.15 times as long, of videos 1.5 times.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "PILLOW_BLOCKS_MAX": "4",  # of 16 MB
}


class DecoderStoppedError(Exception):
    """The process is gone, or what it sends makes no sense; it has been killed."""


class PixelMemory:
    """Memory that a decoder process writes and this one reads; its size is fixed."""

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
        """A frame, uint8 [height, width, 3], that the process can no longer change: what is
        hashed must be what is computed with."""
        size = height * width * 3
        frame = np.frombuffer(self._map, np.uint8, size, slot * size)
        return frame.reshape(height, width, 3).copy()

    def close(self) -> None:
        os.close(self.descriptor)
        self._map.close()


class DecoderProcess:
    """A process that was just started; it is there a quarter of a second later."""

    def __init__(self, limits: MediaLimits) -> None:
        self._cpu_seconds = limits.media_timeout_s * num_cores()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _start(theirs.fileno(), self._cpu_seconds, limits)
        self._memory: PixelMemory | None = None
        disown_after_fork(self)
        self._is_ready = False
        self.sandbox = ""  # what holds it, once it is ready
        self._cancelled = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable once it is
        self._lock = Lock()
        self.open_readers: set[int] = set()
        self.num_readers = 0  # that were opened in its life
        self.is_idle = True  # no reply is outstanding
        self.is_cancelled = False  # the request that uses it
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
        except OSError:  # it is gone
            return 0

    def await_ready(self) -> None:
        """Raises `DecoderStoppedError`."""
        if self._is_ready:
            return
        try:
            reply = self.receive(START_SECONDS)
        except TimeoutError:
            self.fail("did not start")
        if not reply.HasField("ready"):
            self.fail("did not start")
        self.sandbox, self._is_ready = reply.ready.sandbox, True

    def answers(self) -> bool:
        """Whether the process has started and answers, which one that is being killed does not."""
        try:
            self.await_ready()
            self.send(pb.Request(stop=pb.Stop()))
            return self.receive(PING_SECONDS).HasField("stopped")
        except (TimeoutError, DecoderStoppedError):
            return False

    def send(self, request: pb.Request, descriptors: tuple[int, ...] = ()) -> None:
        """Raises `DecoderStoppedError`."""
        try:
            self._channel.settimeout(START_SECONDS)
            socket.send_fds(self._channel, [request.SerializeToString()], descriptors)
        except OSError:  # a time-out is one
            self.fail("does not listen")

    def receive(self, seconds: float) -> pb.Reply:
        """The next reply. Raises `TimeoutError`, soon after `cancel`, and `DecoderStoppedError`."""
        try:
            self._await_packet(seconds)
            data = self._channel.recv(PACKET_BYTES)  # descriptors that come along are dropped
        except TimeoutError:
            raise
        except OSError:
            self.fail("is gone")
        if not data:
            self.fail("is gone")
        try:
            return pb.Reply.FromString(data)
        except DecodeError:
            self.fail("sends what is no reply")

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
        """The request that uses it is over: a thread that waits for a reply stops waiting soon,
        and kills the process only if its work has not ended by then. Callable by any thread."""
        with self._lock:
            self.is_cancelled = True
            if not self.is_killed:
                os.eventfd_write(self._cancelled, 1)

    def end_request(self) -> None:
        """The request has given it back: a cancellation does not concern the next one."""
        with self._lock:
            if self.is_cancelled and not self.is_killed:
                os.eventfd_read(self._cancelled)
            self.is_cancelled = False

    def allow_cpu(self) -> None:
        """CPU time for one more file: past it the kernel ends the process."""
        try:
            most = self._used_cpu_seconds() + self._cpu_seconds
            hard = resource.prlimit(self.pid, resource.RLIMIT_CPU)[1]
            resource.prlimit(self.pid, resource.RLIMIT_CPU, (most, hard))
        except OSError:  # it is gone, as who asks it next will see
            pass

    def allow_memory(self, num_bytes: int) -> None:
        """Set its address space; allocations beyond it fail."""
        if not self.is_alive:
            return
        try:
            hard = resource.prlimit(self.pid, resource.RLIMIT_AS)[1]
            soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
            resource.prlimit(self.pid, resource.RLIMIT_AS, (soft, hard))
        except OSError:  # it is gone, as the next request to it shows
            pass

    def _used_cpu_seconds(self) -> int:
        clock = (~self.pid << 3) | 2  # of the process, as clock_getcpuclockid(3) makes it
        return int(time.clock_gettime(clock)) + 1

    def pixel_memory(self, frame_bytes: int, num_frames: int) -> tuple[PixelMemory, int, bool]:
        """Memory, how many frames of that size it takes, and whether the process lacks it yet."""
        wanted = min(num_frames, MAX_SLOTS, max(1, SLOTS_BYTES // frame_bytes))
        memory = self._memory
        is_new = memory is None or memory.num_bytes < wanted * frame_bytes
        if memory is None or is_new:
            if memory is not None:
                memory.close()
            memory = self._memory = PixelMemory(max(MIN_MEMORY, wanted * frame_bytes))
        return memory, min(num_frames, MAX_SLOTS, memory.num_bytes // frame_bytes), is_new

    def disown(self, cause: str) -> None:
        """Release this process's copies of what ends the decoder when it closes. Called in a forked
        process."""
        self.is_killed = True
        self._channel.close()
        if self._process.stdin:
            self._process.stdin.close()

    def fail(self, what: str) -> NoReturn:
        """Kills the process. Raises `DecoderStoppedError`."""
        self.kill()
        raise DecoderStoppedError(f"the decoder {what}")

    def terminate(self) -> None:
        """Kill it while another thread may be using it, which calls `kill` later."""
        self._process.kill()

    def kill(self) -> None:
        """End it at once: it keeps nothing that would be missed."""
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
    """`-P`: our own folder names (`kernels`, `proto`) must not shadow a user's packages."""
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
        start_new_session=True,  # Ctrl-C in a terminal reaches the engine alone
    )
