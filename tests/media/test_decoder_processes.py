"""Files decoded in a process of its own: the same pixels, and nothing that can hurt."""

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from octavo.benchmarks.media.cases import SHAPE, encoded, mp4, noise
from octavo.benchmarks.media.fuzz import VIDEOS, broken_files
from octavo.benchmarks.media.video_cases import normal_scheduling
from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.decode.frames import FrameList
from octavo.engine.media.decode.opening import OpenReader, open_here
from octavo.engine.media.decode.reader import MediaHeader
from octavo.engine.media.loader import MediaLoader
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.sandbox import pool as child_pool
from octavo.engine.media.sandbox import process as child_process
from octavo.engine.media.sandbox import reader as child_reader
from octavo.engine.media.sandbox import seccomp
from octavo.engine.media.sandbox.pool import DecoderPool
from octavo.engine.media.sandbox.process import DecoderProcess
from octavo.engine.media.sandbox.reader import clean
from octavo.engine.media.source import MediaAccess
from octavo.engine.media.task import MediaTask
from octavo.engine.media.token_budget import MediaTokenBudget
from octavo.engine.utils.cores import num_cores
from octavo.proto import media_pb2 as pb

LIMITS = MediaLimits()
FORMS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
CODECS = (("libx264", "mp4"), ("libx265", "mov"), ("libvpx-vp9", "webm"), ("libsvtav1", "matroska"))


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    pool = DecoderPool(LIMITS, 2)
    yield pool
    pool.close()


@normal_scheduling()
def clip(codec: str, form: str, num_frames: int = 12) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(num_frames):
            level = np.full((64, 64, 3), 20 * i % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def look(
    open_reader: OpenReader,
    kind: str,
    data: bytes,
    limits: MediaLimits = LIMITS,
    indices: tuple[int, ...] = (0,),
) -> tuple[MediaHeader, list[float], list[tuple[int, bytes]]]:
    """All that a reader tells of a file."""
    with open_reader(kind, io.BytesIO(data), limits, kind) as reader:
        times = reader.times(indices)
        frames = [(f.index, f.pixels.tobytes()) for f in reader.frames(indices, 28, 56)]
    return reader.header, times, frames


def pids(pool: DecoderPool) -> list[int]:
    return [process.pid for process in pool._free if process is not None]


def pid_of(lease: child_pool.Lease) -> int:
    """Of the process that it holds, which it starts where it must."""
    return lease._ready_process("image").pid


def state(pid: int) -> str:
    """R, S, Z, ... of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# Equal to decoding here


@pytest.mark.parametrize("form", FORMS)
def test_images_are_the_same(pool: DecoderPool, form: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for mode in ("RGB", "RGBA", "P", "L", "CMYK", "1", "I;16"):
        image = noise() if mode != "I;16" else Image.new("I;16", (40, 30), 40_000)
        try:
            data = encoded(image if mode == "I;16" else image.convert(mode), form, exif=turned)
        except (OSError, ValueError):  # the format has no such mode
            continue
        with pool.lease() as open_reader:
            assert look(open_reader, "image", data) == look(open_here, "image", data)


@pytest.mark.parametrize(("codec", "form"), CODECS)
def test_videos_are_the_same(pool: DecoderPool, codec: str, form: str) -> None:
    data, indices = clip(codec, form), (0, 3, 4, 7, 8, 9, 11)
    with pool.lease() as open_reader:
        there = look(open_reader, "video", data, indices=indices)
    assert there == look(open_here, "video", data, indices=indices)
    assert [index for index, _ in there[2]] == list(indices)


def test_a_file_is_read_through_its_own_descriptor(pool: DecoderPool, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encoded(noise()))
    with pool.lease() as open_reader, path.open("r+b") as file:
        file.seek(9)  # no matter where the caller's place is, and that it may write
        with open_reader("image", file, LIMITS, "image") as reader:
            frame = next(iter(reader.frames([0], 30, 40)))
        assert file.closed
    assert np.array_equal(frame.pixels, np.asarray(noise()))


def test_images_of_this_process_stay_here() -> None:
    pool = DecoderPool(LIMITS, 1)
    with pool.lease() as open_reader, open_reader("image", noise(), LIMITS, "image") as reader:
        assert reader.header.width == 40
    assert pids(pool) == []


def test_decoders_import_nothing_late(tmp_path: Path) -> None:
    """In the sandbox they could not: a file that is good would be called broken."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for form in FORMS:
        (tmp_path / f"image-{form}").write_bytes(encoded(noise(), form, exif=turned))
        palette = noise().convert("L" if form in ("JPEG", "WEBP") else "P")
        (tmp_path / f"image-{form}-P").write_bytes(encoded(palette, form))
    (tmp_path / "image-MPO").write_bytes(encoded(noise(), "MPO", append_images=[noise(seed=1)]))
    (tmp_path / "image-lzw").write_bytes(encoded(noise(), "TIFF", compression="tiff_lzw"))
    (tmp_path / "image-broken").write_bytes(encoded(noise())[:500])
    (tmp_path / "video-mp4").write_bytes(mp4(12))
    (tmp_path / "video-webm").write_bytes(clip("libvpx-vp9", "webm"))
    code = f"""if True:
        import sys
        from pathlib import Path
        from octavo.engine.errors import InputError
        from octavo.engine.media.sandbox import child
        child.preload()
        assert "torch" not in sys.modules
        before = set(sys.modules)
        for path in sorted(Path({str(tmp_path)!r}).iterdir()):
            kind = path.name[:5]
            try:
                reader = child.open_here(kind, path.open("rb"), child.MediaLimits(), kind)
                for frame in reader.frames([0], 28, 28):
                    reader.times([0])
            except InputError:
                assert path.name == "image-broken", path.name
            assert set(sys.modules) == before, (path.name, set(sys.modules) - before)
        """
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_a_frame_is_a_copy(pool: DecoderPool) -> None:
    """What was hashed can no longer be changed by the process that made it."""
    with pool.lease() as open_reader:
        with open_reader("image", io.BytesIO(encoded(noise())), LIMITS, "image") as reader:
            frame = next(iter(reader.frames([0], 30, 40)))
        with open_reader("image", io.BytesIO(encoded(noise(seed=1))), LIMITS, "image") as reader:
            next(iter(reader.frames([0], 30, 40)))
    assert np.array_equal(frame.pixels, np.asarray(noise()))


# L23: what the process gives up

CONFINED = """if True:
    import ctypes, errno, mmap, os, resource, socket, sys, threading
    from octavo.engine.media.sandbox import sandbox, seccomp
    sandbox_apply = lambda: sandbox.apply(1 << 30, 50, 40)
    libc = ctypes.CDLL(None, use_errno=True)
    def refused(call, *codes):
        try:
            call()
        except OSError as error:
            assert error.errno in codes, error
        else:
            raise SystemExit(f"{call} went through")
"""
SHUT = """
    sandbox_apply()
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
        refused(lambda: socket.socket(family), errno.EPERM)
    refused(lambda: open("/etc/passwd"), errno.EPERM)
    refused(lambda: open("/tmp/octavo-written", "w"), errno.EPERM)
    refused(lambda: os.memfd_create("x"), errno.EPERM)
    refused(lambda: os.listdir("/"), errno.EPERM)
    refused(lambda: os.stat("/etc/passwd"), errno.EPERM)
    refused(os.fork, errno.EPERM)
    refused(lambda: os.execv("/bin/true", ["true"]), errno.EPERM)
    refused(lambda: os.kill(os.getppid(), 0), errno.EPERM)
    refused(lambda: os.fchmod(0, 0o777), errno.EPERM)
    refused(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC), errno.EPERM)
    thread = threading.Thread(target=lambda: refused(os.fork, errno.EPERM))
    thread.start()  # libraries have threads; the filter holds them too
    thread.join()
"""
MEMORY = """
    sandbox_apply()
    bytearray(500 << 20)
    try:
        bytearray(1 << 30)
    except MemoryError:
        os._exit(0)
    raise SystemExit("more memory than the limit")
"""
LIMITED = """
    sandbox_apply()
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        assert resource.getrlimit(limit) == (0, 0)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 40
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] == 50
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        try:
            resource.setrlimit(limit, (-1, -1))
        except (OSError, ValueError):
            continue
        raise SystemExit("a limit was raised")
    assert libc.prctl(3, 0, 0, 0, 0) == -1  # refused by the filter as well
"""
LANDLOCK_ALONE = """
    libc.prctl(38, 1, 0, 0, 0)
    if libc.syscall(444, None, 0, 1) < 1:
        os._exit(77)
    assert sandbox._install_landlock(libc)
    refused(lambda: open("/etc/passwd"), errno.EACCES)
    refused(lambda: open("/tmp/octavo-written", "w"), errno.EACCES)
    refused(lambda: socket.create_connection(("127.0.0.1", 9)), errno.EACCES)
"""
CPU_TIME = """
    sandbox.apply(1 << 30, 1, 40)
    while True:
        pass
"""


def confined(code: str) -> int:
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", CONFINED + code + "\n    os._exit(0)\n"]
    done = subprocess.run(command, capture_output=True, timeout=60, text=True, env=env)
    if done.returncode == 77:
        pytest.skip("this system has none")
    assert done.returncode <= 0, done.stderr
    return done.returncode


@pytest.mark.lesson("L23")
@pytest.mark.parametrize("code", [SHUT, MEMORY, LIMITED, LANDLOCK_ALONE])
def test_codec_sandbox(code: str) -> None:
    assert confined(code) == 0


def verdict(machine: str, number: int, *arguments: int) -> int:
    """What the filter answers to a call, by an interpreter of the operations that it uses."""
    architecture = seccomp.ARCHITECTURES[machine][1]
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    operations, at, value = list(struct.iter_unpack("=HBBI", seccomp.program(machine))), 0, 0
    while True:
        code, if_true, if_false, operand = operations[at]
        at += 1
        if code == seccomp.LOAD:
            (value,) = struct.unpack_from("=I", data, operand)
        elif code == seccomp.AND:
            value &= operand
        elif code == seccomp.JUMP_EQUAL:
            at += if_true if value == operand else if_false
        else:
            return operand


@pytest.mark.lesson("L23")
@pytest.mark.parametrize(
    ("machine", "read", "clone", "mmap", "prlimit", "denied"),
    [
        # open, socket, connect, execve, fork, ptrace, openat, kill, chmod, bpf, io_uring_setup
        ("x86_64", 0, 56, 9, 302, (2, 41, 42, 59, 57, 101, 257, 62, 90, 321, 425)),
        ("aarch64", 63, 220, 222, 261, (56, 198, 203, 221, 117, 129, 52, 280, 425)),
    ],
)
def test_codec_filter_of_each_machine(
    machine: str, read: int, clone: int, mmap: int, prlimit: int, denied: tuple[int, ...]
) -> None:
    allow, deny = seccomp.ALLOW, seccomp.DENY
    assert verdict(machine, read, 3, 0, 10) == allow
    assert [verdict(machine, number) for number in denied] == [deny] * len(denied)
    assert verdict(machine, read | 0x40000000) == deny  # x32's numbers
    assert verdict(machine, clone, 0x3D0F00) == allow  # as pthread_create
    assert verdict(machine, clone, 0x11) == deny  # as fork
    assert verdict(machine, 435) == seccomp.UNKNOWN_CALL
    assert [verdict(machine, mmap, 0, 4096, prot) for prot in (3, 5, 7)] == [allow, deny, deny]
    assert verdict(machine, prlimit, 0, 7, 0) == allow
    for arguments in ((1, 7, 0), (0, 7, 1), (0, 7, 1 << 32)):
        assert verdict(machine, prlimit, *arguments) == deny


@pytest.mark.lesson("L23")
def test_codec_cpu_time() -> None:
    assert confined(CPU_TIME) == -signal.SIGXCPU


@pytest.mark.lesson("L23")
def test_codec_a_process_is_shut_in(pool: DecoderPool) -> None:
    """As it runs: the filter and the limits are there, and no thread that came before them."""
    with pool.lease() as lease:
        status = Path(f"/proc/{pid_of(lease)}/status").read_text()
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert (lines["Seccomp"], lines["NoNewPrivs"], lines["Threads"]) == ("2", "1", "1")
        assert lease._process is not None and "no network" in lease._process.sandbox
        limits = Path(f"/proc/{pid_of(lease)}/limits").read_text()
        assert str(LIMITS.decoder_memory_bytes) in limits
        names = os.listdir(f"/proc/{pid_of(lease)}/fd")
        where = {os.readlink(f"/proc/{pid_of(lease)}/fd/{name}") for name in names}
        known = ("/dev/null", "pipe:", "socket:", "/memfd:", "anon_inode:[landlock")
        assert all(each.startswith(known) for each in where), where


@pytest.mark.lesson("L23")
def test_codec_its_environment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    process = DecoderProcess(LIMITS)
    try:
        process.await_ready()
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"MALLOC_ARENA_MAX" in environment and b"secret-token" not in environment
    finally:
        process.kill()


@pytest.mark.lesson("L23")
def test_codec_error_texts_are_short_and_plain() -> None:
    assert clean("a\nb\x1b[31m\u202ec") == "a b [31m c"
    assert len(clean("x" * 10_000)) < 600


# L22, L13: bombs, crashes, floods: one request's error each


def expect_stopped(lease: child_pool.Lease, data: bytes, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(InputError) as caught:
        look(lease, "image", data, limits)
    assert caught.value.field == "image"
    return str(caught.value)


@pytest.mark.lesson("L13")
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_leaks_a_crash_is_one_requests(number: int) -> None:
    pool, data = DecoderPool(LIMITS, 2), encoded(noise())
    with pool.lease() as other, other("image", io.BytesIO(data), LIMITS, "image") as reader:
        with pool.lease() as lease:
            first = pid_of(lease)
            with lease("image", io.BytesIO(data), LIMITS, "image") as mine:
                os.kill(first, number)
                with pytest.raises(InputError, match="image: could not be decoded: the decoder"):
                    list(mine.frames([0], 30, 40))
            assert look(lease, "image", data) == look(open_here, "image", data)
            second = pid_of(lease)
        assert second != first and not Path(f"/proc/{first}").exists()
        assert np.array_equal(next(iter(reader.frames([0], 30, 40))).pixels, np.asarray(noise()))
    with pool.lease() as lease:  # one that died while nobody used it
        third = pid_of(lease)
        os.kill(third, number)
        os.waitid(os.P_PID, third, os.WEXITED | os.WNOWAIT)
    with pool.lease() as lease:
        assert look(lease, "image", data) == look(open_here, "image", data)
    pool.close()


@pytest.mark.lesson("L22")
def test_bombs_memory() -> None:
    """An image within the limit of pixels, and more than the process may hold."""
    limits = MediaLimits(decoder_memory_bytes=460 << 20)
    pool = DecoderPool(limits, 1)
    bomb = encoded(Image.new("RGB", (9000, 9000)), "PNG", compress_level=1)
    assert len(bomb) < 2 << 20 and look(open_here, "image", bomb)
    with pool.lease() as lease:
        expect_stopped(lease, bomb, limits)
        good = encoded(noise())
        assert look(lease, "image", good) == look(open_here, "image", good)
    pool.close()


@pytest.mark.lesson("L22")
def test_bombs_time() -> None:
    """A process that is still at it when the file's time is up is ended; the flag is named."""
    limits = MediaLimits(media_timeout_s=1)
    pool = DecoderPool(limits, 1)
    with pool.lease() as lease:
        first = pid_of(lease)
        os.kill(first, signal.SIGSTOP)
        text = expect_stopped(lease, encoded(noise()), limits)
        assert "--media-timeout-s" in text and not Path(f"/proc/{first}").exists()
        look(lease, "image", encoded(noise()), limits)
    pool.close()


@pytest.mark.lesson("L22")
def test_bombs_cpu_time_is_given_again(pool: DecoderPool) -> None:
    with pool.lease() as lease:
        look(lease, "image", encoded(noise()))
        lines = Path(f"/proc/{pid_of(lease)}/limits").read_text().splitlines()
    soft = next(int(line.split()[3]) for line in lines if line.startswith("Max cpu time"))
    cores = num_cores()
    assert LIMITS.media_timeout_s * cores < soft < LIMITS.media_timeout_s * cores + 60


@pytest.mark.lesson("L13")
def test_leaks_a_process_that_grew_or_is_old_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = DecoderPool(LIMITS, 1)
    seen = []
    for name, value in (("MAX_READERS", 10**9), ("MAX_READERS", 1), ("MAX_RESIDENT", 1)):
        monkeypatch.setattr(child_pool, name, value)
        with pool.lease() as lease:
            look(lease, "image", encoded(noise()))
            seen.append(pid_of(lease))
    assert seen[0] == seen[1] and len({*seen, *pids(pool)}) == 3
    pool.close()


# A process that was taken over: it says what it likes


class Liar:
    """A `DecoderProcess` whose other end is the test's."""

    def __init__(self, *replies: bytes) -> None:
        self.process = DecoderProcess(LIMITS)
        self.process.await_ready()
        real, (ours, theirs) = (
            self.process._channel,
            child_process.socket.socketpair(
                child_process.socket.AF_UNIX, child_process.socket.SOCK_SEQPACKET
            ),
        )
        real.close()
        self.process._channel, self.theirs = ours, theirs
        for reply in replies:
            theirs.send(reply)

    def error(self) -> str:
        try:
            with pytest.raises(InputError) as caught:
                file = io.BytesIO(encoded(noise()))
                reader = child_reader.ChildReader(
                    self.process, "video", file, LIMITS, "video", LIMITS.media_timeout_s
                )
                reader.times([0, 1])
                list(reader.frames([0, 1], 28, 28))
        finally:
            was_killed = self.process.is_killed
            self.process.kill()
            self.theirs.close()
        assert was_killed or "pixels" in str(caught.value)
        return str(caught.value)


def header(height: int = 28, width: int = 28, fps: float = 1.0) -> bytes:
    said = pb.Header(height=height, width=width, num_frames=2, fps=fps)
    return pb.Reply(header=said).SerializeToString()


def times(*values: float) -> bytes:
    return pb.Reply(times=pb.Times(times=values)).SerializeToString()


def frame(index: int) -> bytes:
    return pb.Reply(frame_ready=pb.FrameReady(index=index)).SerializeToString()


@pytest.mark.lesson("L23")
@pytest.mark.parametrize(
    "replies",
    [
        (b"\xff" * 50,),
        (times(1.0),),
        (header(fps=float("nan")),),
        (header(height=0),),
        (header(height=1 << 20, width=1 << 20),),
        (header(), times(1.0)),
        (header(), times(0.0, float("inf"))),
        (header(), times(0.0, 1.0), frame(5)),
        (header(), times(0.0, 1.0), frame(1), frame(0)),
        (header(), times(0.0, 1.0), frame(0), frame(0)),
    ],
)
def test_codec_lies_are_one_requests_error(replies: tuple[bytes, ...]) -> None:
    assert Liar(*replies).error().startswith("video: ")


# Streams


def test_a_stream_is_stopped_and_the_process_goes_on(pool: DecoderPool) -> None:
    data, indices = mp4(300), tuple(range(300))
    with pool.lease() as lease:
        pid = pid_of(lease)
        with lease("video", io.BytesIO(data), LIMITS, "video") as reader:
            for taken in (1, 3, 9, 299):
                stream = reader.frames(indices, 28, 28)
                assert [next(stream).index for _ in range(taken)] == list(range(taken))
                stream.close()  # type: ignore[attr-defined]
            assert len(list(reader.frames(indices, 28, 28))) == 300
        assert pid_of(lease) == pid


def test_a_stream_that_does_not_stop_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_reader, "STOP_SECONDS", 0.05)
    pool = DecoderPool(LIMITS, 1)
    with pool.lease() as lease:
        first = pid_of(lease)
        with lease("video", io.BytesIO(mp4(300)), LIMITS, "video") as reader:
            stream = reader.frames(range(300), 28, 28)
            next(stream)
            os.kill(first, signal.SIGSTOP)
            stream.close()  # type: ignore[attr-defined]
        assert pid_of(lease) != first
    pool.close()


def test_no_more_frames_are_made_than_there_is_room_for(pool: DecoderPool) -> None:
    """A reader that is not asked on leaves the process waiting, not decoding ahead."""
    with pool.lease() as lease, lease("video", io.BytesIO(mp4(300)), LIMITS, "video") as reader:
        stream = reader.frames(range(300), 28, 28)
        next(stream)
        assert lease._process is not None
        waits = Path(f"/proc/{lease._process.pid}/stat")
        deadline = time.monotonic() + 10
        while waits.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline
        came = 0
        lease._process._channel.settimeout(0.2)
        with pytest.raises(TimeoutError):
            while lease._process._channel.recv(100):
                came += 1
        assert came <= child_process.MAX_SLOTS
        lease._process.kill()
        stream.close()  # type: ignore[attr-defined]


def test_a_lease_goes_from_thread_to_thread(pool: DecoderPool) -> None:
    with pool.lease() as lease, lease("video", io.BytesIO(mp4(40)), LIMITS, "video") as reader:
        stream = reader.frames(range(40), 28, 28)
        seen = [next(stream).index]
        thread = threading.Thread(target=lambda: seen.extend(f.index for f in stream))
        thread.start()
        thread.join()
    assert seen == list(range(40))


def test_a_file_with_fewer_frames_than_it_says_ends_early() -> None:
    done = pb.Reply(done=pb.Done()).SerializeToString()
    liar = Liar(header(), frame(1), done)
    file = io.BytesIO(encoded(noise()))
    reader = child_reader.ChildReader(liar.process, "video", file, LIMITS, "video", 9.0)
    with reader:
        assert [each.index for each in reader.frames([0, 1, 2], 28, 28)] == [1]
        assert not liar.process.is_killed  # nothing is left to be stopped
    liar.process.kill()
    liar.theirs.close()


def test_lists_of_a_thousand_frames(pool: DecoderPool) -> None:
    sources = [encoded(noise(28, 28, seed=i % 7), "BMP") for i in range(1000)]
    with pool.lease() as lease:

        def open_image(source: bytes, field: str) -> child_pool.MediaReader:
            return lease("image", io.BytesIO(source), LIMITS, field)

        with FrameList(sources, open_image, 2.0, "video") as reader:
            for each in reader.frames(range(1000), 28, 28):
                expected = np.asarray(noise(28, 28, seed=each.index % 7))
                assert np.array_equal(each.pixels, expected)


def test_many_items_of_one_request_are_open_at_once(pool: DecoderPool) -> None:
    with pool.lease() as lease:
        readers = [
            lease("image", io.BytesIO(encoded(noise(seed=i))), LIMITS, "image")
            for i in range(LIMITS.max_media_items)
        ]
        for i, reader in enumerate(readers):
            with reader:
                frame = next(iter(reader.frames([0], 30, 40)))
            assert np.array_equal(frame.pixels, np.asarray(noise(seed=i)))


# The pool


def await_waiter(pool: DecoderPool, count: int = 1) -> None:
    """Until so many leases wait for a process."""
    deadline = time.monotonic() + 10
    while len(pool._all_slots._waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_lease_waits_for_a_process_and_close_ends_the_wait() -> None:
    pool, outcomes = DecoderPool(LIMITS, 1), []

    def take() -> None:
        try:
            with pool.lease() as lease:
                pid_of(lease)
                outcomes.append("taken")
        except RuntimeError:
            outcomes.append("closed")

    with pool.lease() as lease:
        first = pid_of(lease)
        waiting = threading.Thread(target=take)
        waiting.start()
        await_waiter(pool)
        assert not outcomes
    waiting.join(10)
    assert outcomes == ["taken"] and pids(pool) == [first]
    with pool.lease() as lease, lease("image", io.BytesIO(encoded(noise())), LIMITS, "x") as reader:
        waiting = threading.Thread(target=take)
        waiting.start()
        pool.close()
        waiting.join(10)
        with pytest.raises(InputError, match="the decoder stopped"):
            list(reader.frames([0], 28, 28))
    assert outcomes == ["taken", "closed"] and not Path(f"/proc/{first}").exists()


def test_processes_end_with_their_parent() -> None:
    """Also in the middle of work, and however the parent ends."""
    code = """if True:
        import io, time
        from octavo.engine.media.sandbox.pool import DecoderPool
        from octavo.engine.config.media_limits import MediaLimits
        lease = DecoderPool(MediaLimits(), 1).lease().__enter__()
        print(lease._ready_process("x").pid, flush=True)
        time.sleep(100)
        """
    command = [sys.executable, "-P", "-c", code]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").is_symlink() and time.monotonic() < deadline:
        if state(pid) == "Z":
            return  # dead; nobody here collects it
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


# L13: nothing grows


def fuzz(pool: DecoderPool, seed: int, count: int) -> None:
    """Damaged files of every format: decoded, or refused with a text of ours; never a crash."""
    for number, (form, data) in enumerate(broken_files(seed, count)):
        kind = "video" if form in VIDEOS else "image"
        with pool.lease() as lease:
            first = pid_of(lease)
            try:
                look(lease, kind, data)
            except InputError as error:
                assert str(error).startswith(kind) and "--media-timeout-s" not in str(error)
            assert pid_of(lease) == first, (seed, number, form)


@pytest.mark.lesson("L13")
def test_leaks_broken_files(pool: DecoderPool) -> None:
    fuzz(pool, 1, 200)


@pytest.mark.lesson("L13")
@pytest.mark.slow
def test_leaks_ten_thousand_broken_files(pool: DecoderPool) -> None:
    fuzz(pool, 2, 10_000)


def resident(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def soak(count: int) -> tuple[float, float]:
    """Bytes an item that this process and the decoder grow by, of the second half."""
    pool, data, video = DecoderPool(LIMITS, 1), encoded(noise(300, 200), "JPEG"), mp4(8)
    sizes = []
    with pool.lease() as lease:
        for i in range(count):
            look(lease, *(("video", video) if i % 5 == 0 else ("image", data)))
            if i in (count // 2, count - 1):
                sizes.append((resident("self"), resident(pid_of(lease))))
        descriptors = len(os.listdir(f"/proc/{pid_of(lease)}/fd"))
        assert descriptors < 10
    pool.close()
    (ours, theirs), (ours_last, theirs_last) = sizes
    return (ours_last - ours) / (count / 2), (theirs_last - theirs) / (count / 2)


@pytest.mark.lesson("L13")
def test_leaks_descriptors_and_memory() -> None:
    soak(20)
    before = len(os.listdir("/proc/self/fd"))
    slopes = soak(300)
    assert max(slopes) < 20_000  # an image is 180,000
    assert len(os.listdir("/proc/self/fd")) == before
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    states = [
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children
    ]
    assert "Z" not in states


@pytest.mark.lesson("L13")
@pytest.mark.slow
def test_leaks_five_thousand_items() -> None:
    # The allocator's steps of a MB or two are some 800 bytes an item here; an image is 180,000.
    assert max(soak(5_000)) < 2_000


def test_frames_of_a_list_are_resized_in_the_process(pool: DecoderPool) -> None:
    """As here, and so that no large frame comes over."""
    stills = [encoded(noise(400, 300, seed=i)) for i in range(3)]
    whole = []
    for open_reader in (open_here, None):
        with pool.lease() as lease:
            task = MediaTask(LIMITS, open_reader or lease)
            loader = MediaLoader(PreprocessConfig(), SHAPE, MediaAccess(roots=()), LIMITS)
            room = MediaTokenBudget(9000, 0, 1, SHAPE.factor)
            opened = loader.open("video", stills, MediaOptions(), room, "video", task)
            units = list(loader.units([opened], task))
            whole.append(np.concatenate([unit.pixels for unit in units]))
    np.testing.assert_array_equal(*whole)
    assert whole[0].shape[0] == 4
