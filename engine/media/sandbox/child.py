"""Decoder process for untrusted files: `python -P -m octavo.engine.media.sandbox.child`.

`DecoderProcess` starts it and exchanges the messages of `proto/media.proto` with it. It has access
only to the files it receives. It does not import torch, so it starts in a quarter of a second.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import importlib
import io
import mmap
import os
import pkgutil
import signal
import socket
from collections.abc import Sequence
from typing import NoReturn

import av
import numpy as np
import PIL.Image

from ....proto import media_pb2 as pb
from ...config.media_limits import MediaLimits
from ...errors import InputError
from ..decode.opening import open_here
from ..decode.reader import Frame, MediaReader, Pixels
from . import sandbox

PACKET_BYTES = 256 * 1024  # more than a socket pair's maximum packet
READ_AHEAD = 256 * 1024  # size of a file's buffer, bytes
OUT_OF_MEMORY = "cannot be decoded within --decoder-memory-bytes"
FAILED = "could not be decoded"

# Modules and codecs that decoders load lazily. Loaded early, because the sandbox blocks opening
# files.
UNUSED_MODULES = ("av.__main__", "av.datasets")
LATE_MODULES = (
    "glob",
    "numpy.ma",
    *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Png", "Ppm", "Tiff", "WebP")),
    "PIL.DibImageFile",
    "PIL.MpoImagePlugin",
    "PIL.ImageChops",
    "PIL.ImageCms",
    "PIL.ImageOps",
    "PIL.ImageSequence",
)
LATE_CODECS = ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1252")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="octavo.engine.media.sandbox.child")
    for name in ("socket", "memory-bytes", "cpu-seconds", "files"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(arguments)
    end_with_parent()
    preload()
    channel = socket.socket(fileno=given.socket)
    silence()
    restrictions = sandbox.apply(given.memory_bytes, given.cpu_seconds, given.files)
    server = DecoderServer(channel)
    server.answer(pb.Reply(ready=pb.Ready(sandbox=restrictions)))
    while True:
        server.serve()


def end_with_parent() -> None:
    """Have the kernel kill this process when the other end of its stdin closes.

    This works while the process is busy or stopped, too.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)  # SIGIO waits for a stopped process to continue
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def preload() -> None:
    """Load all modules and codecs that decoders may need."""
    av_modules = (module.name for module in pkgutil.walk_packages(av.__path__, "av."))
    for name in (*LATE_MODULES, *(name for name in av_modules if name not in UNUSED_MODULES)):
        try:
            importlib.import_module(name)
        except ImportError:  # missing in this release or build of Pillow
            continue
    for name in LATE_CODECS:
        codecs.lookup(name)
    PIL.Image.MAX_IMAGE_PIXELS = None  # `max_media_pixels` applies instead


def silence() -> None:
    """Discard the output of decoders: untrusted files control it, and it may reveal memory."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    os.close(devnull)


class _Stopped(Exception):
    """The engine stopped the stream of frames."""


class DecoderServer:
    """Serves requests one after another. Readers stay open from Open to Close."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._readers: dict[int, MediaReader] = {}
        self._memory: Pixels | None = None  # uint8 [num_bytes]: frame slots in shared memory

    def serve(self) -> None:
        request, descriptors = self._receive()
        try:
            reply = self._handle(request, descriptors)
        except InputError as error:
            reply = pb.Reply(error=pb.Error(text=str(error)))
        except MemoryError:
            reply = pb.Reply(error=pb.Error(text=OUT_OF_MEMORY))
        except Exception:  # not its text, which may reveal memory
            reply = pb.Reply(error=pb.Error(text=FAILED))
        if reply is not None:
            self.answer(reply)

    def answer(self, reply: pb.Reply) -> None:
        try:
            self._channel.send(reply.SerializeToString())
        except OSError:
            _end()

    def _receive(self) -> tuple[pb.Request, list[int]]:
        try:
            data, descriptors, *_ = socket.recv_fds(self._channel, PACKET_BYTES, 1)
        except OSError:
            _end()
        if not data:
            _end()
        return pb.Request.FromString(data), descriptors

    def _handle(self, request: pb.Request, descriptors: list[int]) -> pb.Reply | None:
        kind = request.WhichOneof("request")
        if kind == "open":
            return self._open(request.open, *descriptors)
        if kind == "get_times":
            asked = request.get_times
            times = self._readers[asked.reader_id].times(list(asked.indices))
            return pb.Reply(times=pb.Times(times=times))
        if kind == "get_frames":
            return self._send_frames(request.get_frames, descriptors)
        if kind == "close":
            reader = self._readers.pop(request.close.reader_id, None)
            if reader is not None:
                reader.__exit__(None, None, None)
        if kind == "stop":  # sent before the engine had received the stream's end, or as a ping
            return pb.Reply(stopped=pb.Stopped())
        return None

    def _open(self, asked: pb.Open, descriptor: int) -> pb.Reply:
        raw = io.FileIO(descriptor)
        raw.name = asked.kind  # PyAV requires a string; FileIO's name is the descriptor number
        file = io.BufferedReader(raw, READ_AHEAD)
        try:
            reader = open_here(asked.kind, file, MediaLimits(**asked.limits), asked.field)
        except BaseException:
            file.close()
            raise
        self._readers[asked.reader_id] = reader
        header = reader.header
        return pb.Reply(
            header=pb.Header(
                height=header.height,
                width=header.width,
                num_frames=header.num_frames,
                fps=header.fps,
            )
        )

    def _send_frames(self, asked: pb.GetFrames, descriptors: list[int]) -> pb.Reply | None:
        if descriptors:
            self._map(descriptors[0], asked.buffer_bytes)
        size = asked.height, asked.width
        frames = self._readers[asked.reader_id].frames(list(asked.indices), *size)
        free, left = asked.num_slots, len(asked.indices)
        try:
            for count, frame in enumerate(frames):
                free = self._wait_for_slot(free)
                self._put(frame, count % asked.num_slots, size)
                free, left = free - 1, left - 1
                self.answer(pb.Reply(frame_ready=pb.FrameReady(index=frame.index)))
                if not left:
                    return None
        except _Stopped:
            return pb.Reply(stopped=pb.Stopped())
        finally:
            close = getattr(frames, "close", None)  # a generator's
            if close is not None:
                close()
        return pb.Reply(done=pb.Done())

    def _wait_for_slot(self, free: int) -> int:
        """Return the number of free slots; wait until there is at least one. Raises `_Stopped`."""
        while True:
            try:  # not `recv_fds`, which ignores its flags
                data = self._channel.recv(PACKET_BYTES, socket.MSG_DONTWAIT if free else 0)
            except BlockingIOError:
                return free
            except OSError:
                _end()
            if not data:
                _end()
            if not pb.Request.FromString(data).HasField("frame_taken"):
                raise _Stopped
            free += 1

    def _put(self, frame: Frame, slot: int, size: tuple[int, int]) -> None:
        assert self._memory is not None
        num_bytes = size[0] * size[1] * 3
        target = self._memory[slot * num_bytes : (slot + 1) * num_bytes]
        np.copyto(target.reshape(*size, 3), frame.pixels)

    def _map(self, descriptor: int, num_bytes: int) -> None:
        self._memory = None  # unmap the old memory first: address space is limited
        try:
            self._memory = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
        finally:
            os.close(descriptor)


def _end() -> NoReturn:
    """Exit at once when the engine has ended; skip cleanup, because decoder threads may hang."""
    os._exit(0)


if __name__ == "__main__":
    main()
