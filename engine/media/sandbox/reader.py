"""`MediaReader` of a file that is open in a decoder process."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import BinaryIO, NoReturn, Self

from ....proto import media_pb2 as pb
from ...config.media_limits import MediaLimits, setting
from ...errors import InputError
from ..decode.reader import Frame, MediaHeader
from .process import DecoderProcess, DecoderStoppedError, PixelMemory

STOP_SECONDS = 0.5  # grace period to stop a stream; decoding a group of pictures may take long
CANCELLED = "the request was cancelled"
MAX_TEXT = 500  # characters of an error's text
TIMES_AT_ONCE = 4096  # indices per packet
STOPPED = (
    "could not be decoded: the decoder stopped; the file is corrupt or exceeds the limits of "
    f"memory or time ({setting('decoder_memory_bytes')}; {setting('media_timeout_s')})"
)


class ChildReader:
    """One file in `process`, of which this thread is the only user. It closes the file."""

    def __init__(
        self,
        process: DecoderProcess,
        kind: str,
        file: BinaryIO,
        limits: MediaLimits,
        field: str,
        seconds: float,
    ) -> None:
        """Send the file to the process and read its header.

        `seconds` limits the total time of waiting for the process. Raises `InputError` if the file
        is invalid or the process fails.
        """
        self._process, self._limits, self._field = process, limits, field
        self._seconds_left = seconds
        self._is_streaming = False
        process.num_readers += 1
        self._id = process.num_readers
        opening = pb.Open(reader_id=self._id, kind=kind, field=field, limits={**asdict(limits)})
        process.allow_cpu()
        descriptor = readable(file)
        try:
            self._send(pb.Request(open=opening), descriptor)
        finally:
            os.close(descriptor)
        process.open_readers.add(self._id)
        try:
            self.header = self._checked(self._receive("header").header)
        except BaseException:
            self._close()
            raise
        file.close()

    def _checked(self, header: pb.Header) -> MediaHeader:
        """Validate a header: a compromised process may send anything."""
        if not (header.num_frames and math.isfinite(header.fps) and header.fps > 0):
            self._fail("sent an invalid header")
        self._limits.check_size(header.width, header.height, self._field)
        return MediaHeader(header.height, header.width, header.num_frames, header.fps)

    def times(self, indices: Sequence[int]) -> list[float]:
        times: list[float] = []
        for first in range(0, len(indices), TIMES_AT_ONCE):
            some = indices[first : first + TIMES_AT_ONCE]
            self._send(pb.Request(get_times=pb.GetTimes(reader_id=self._id, indices=some)))
            answer = self._receive("times").times.times
            if len(answer) != len(some) or not all(map(math.isfinite, answer)):
                self._fail("sent invalid times")
            times.extend(answer)
        return times

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        memory, num_slots = self._ask_for_frames(indices, height, width)
        wanted = iter(indices)
        try:
            for count in range(len(indices)):
                reply = self._receive("frame_ready", "done")
                if reply.HasField("done"):
                    self._end_stream()
                    return
                index = reply.frame_ready.index
                # `in` advances the iterator, so this also rejects repeated and unordered frames.
                if index not in wanted:
                    self._fail("sent a frame that was not requested")
                pixels = memory.copy(count % num_slots, height, width)
                if count + 1 < len(indices):
                    self._send(pb.Request(frame_taken=pb.FrameTaken()))
                else:
                    self._end_stream()
                yield Frame(index, pixels)
        finally:
            self._stop()

    def _ask_for_frames(
        self, indices: Sequence[int], height: int, width: int
    ) -> tuple[PixelMemory, int]:
        self._check_usable()
        memory, num_slots, is_new = self._process.pixel_memory(height * width * 3, len(indices))
        asked = pb.GetFrames(
            reader_id=self._id,
            indices=indices,
            height=height,
            width=width,
            num_slots=num_slots,
            buffer_bytes=memory.num_bytes if is_new else 0,
        )
        self._process.allow_cpu()
        descriptors = (memory.descriptor,) if is_new else ()
        self._send(pb.Request(get_frames=asked), *descriptors)
        self._is_streaming = True
        return memory, num_slots

    def _end_stream(self) -> None:
        self._is_streaming, self._process.is_idle = False, True

    def _stop(self) -> None:
        """Stop a stream before its end; kill the process if it does not stop in time."""
        if not self._is_streaming:
            return
        self._is_streaming = False
        deadline = time.monotonic() + STOP_SECONDS
        try:
            self._process.send(pb.Request(stop=pb.Stop()))
            while True:
                reply = self._process.receive(deadline - time.monotonic())
                if reply.HasField("stopped"):
                    self._process.is_idle = True
                    return
        except TimeoutError:
            self._process.kill()
        except DecoderStoppedError:
            return

    def _send(self, request: pb.Request, *descriptors: int) -> None:
        self._check_usable()
        self._process.is_idle = False
        try:
            self._process.send(request, descriptors)
        except DecoderStoppedError:
            raise InputError(self._field, STOPPED) from None

    def _check_usable(self) -> None:
        """Raise `InputError` if the process was killed or the request was cancelled."""
        if self._process.is_killed:
            raise InputError(self._field, STOPPED)
        if self._process.is_cancelled:
            raise InputError(self._field, CANCELLED)

    def _receive(self, *kinds: str) -> pb.Reply:
        """Return a reply of one of `kinds`, within the file's remaining time.

        Raises `InputError` for other replies, an error reply or a timeout.
        """
        start_time = time.monotonic()
        try:
            reply = self._process.receive(self._seconds_left)
        except TimeoutError:
            self._process.kill()
            if self._process.is_cancelled:
                raise InputError(self._field, CANCELLED) from None
            spent = f"not decoded after {self._limits.media_timeout_s} seconds"
            self._limits.refuse("media_timeout_s", self._field, spent)
        except DecoderStoppedError:
            raise InputError(self._field, STOPPED) from None
        self._seconds_left -= time.monotonic() - start_time
        kind = reply.WhichOneof("reply")
        self._process.is_idle = kind in ("header", "times", "error")
        if kind == "error":
            self._is_streaming = False
            raise InputError(self._field, clean(reply.error.text))
        if kind not in kinds:
            self._fail("sent an unexpected reply")
        return reply

    def _fail(self, what: str) -> NoReturn:
        try:
            self._process.fail(what)
        except DecoderStoppedError:
            raise InputError(self._field, STOPPED) from None

    def _close(self) -> None:
        self._stop()
        if self._id in self._process.open_readers and not self._process.is_killed:
            self._process.open_readers.discard(self._id)
            try:
                self._process.send(pb.Request(close=pb.Close(reader_id=self._id)))
            except DecoderStoppedError:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()


def clean(text: str) -> str:
    """Reduce an error text of a possibly compromised process to one short, printable line."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * MAX_TEXT])
    return line if len(line) <= MAX_TEXT else line[:MAX_TEXT] + " ..."


def readable(file: BinaryIO) -> int:
    """Return a read-only file descriptor of the file, positioned at its start."""
    try:
        number = file.fileno()
    except (OSError, AttributeError):  # bytes in memory
        return _shared_copy(file)
    file.flush()
    # Opened again, the file has its own position, which the decoder does not share.
    return os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)


def _shared_copy(file: BinaryIO) -> int:
    number = os.memfd_create("octavo-media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        file.seek(0)
        with os.fdopen(os.dup(number), "wb", buffering=0) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
        os.lseek(number, 0, os.SEEK_SET)
    except BaseException:
        os.close(number)
        raise
    return number
