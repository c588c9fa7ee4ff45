"""Files decoded in a process of its own: the same pixels, and nothing that can hurt."""

import io
import os
import signal
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

from octavo.benchmarks.media_cases import encoded, mp4, noise
from octavo.engine.input_error import InputError
from octavo.engine.media import child, child_pool, child_process, child_reader
from octavo.engine.media.child_pool import DecoderPool
from octavo.engine.media.child_process import DecoderProcess
from octavo.engine.media.child_reader import clean
from octavo.engine.media.frames import FrameList
from octavo.engine.media.limits import MediaLimits
from octavo.engine.media.loader import OpenReader, open_here
from octavo.engine.media.reader import MediaHeader
from octavo.proto import media_pb2 as pb

LIMITS = MediaLimits()
FORMS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
CODECS = (("libx264", "mp4"), ("libx265", "mov"), ("libvpx-vp9", "webm"), ("libsvtav1", "matroska"))


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    pool = DecoderPool(LIMITS, 2)
    yield pool
    pool.close()


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
        from octavo.engine.input_error import InputError
        from octavo.engine.media import child
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
    from octavo.engine.media import sandbox, seccomp
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


@pytest.mark.parametrize("code", [SHUT, MEMORY, LIMITED, LANDLOCK_ALONE])
def test_L23_codec_sandbox(code: str) -> None:
    assert confined(code) == 0


def test_L23_codec_cpu_time() -> None:
    assert confined(CPU_TIME) == -signal.SIGXCPU


def test_L23_codec_a_process_is_shut_in(pool: DecoderPool) -> None:
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


def test_L23_codec_its_environment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    process = DecoderProcess(LIMITS)
    try:
        process.await_ready()
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"MALLOC_ARENA_MAX" in environment and b"secret-token" not in environment
    finally:
        process.kill()


def test_L23_codec_error_texts_are_short_and_plain() -> None:
    assert clean("a\nb\x1b[31m\u202ec") == "a b [31m c"
    assert len(clean("x" * 10_000)) < 600
