"""Decoder processes shared by requests: what one request does never hurts another (L41)."""

import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import wait_for
from octavo.benchmarks.media.cases import encoded, mp4, noise, without_late_frames
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import DecoderUnavailable, InputError
from octavo.engine.input.parsed_prompt import ParsedPrompt
from octavo.engine.input.preprocess_pool import InputPool, PreprocessPools
from octavo.engine.input.processor import InputProcessor
from octavo.engine.media.decode.reader import MediaHeader
from octavo.engine.media.decode.webp import webp_header
from octavo.engine.media.sandbox import process
from octavo.engine.media.sandbox.plan import MEMORY_SHARE, SMALL_BYTES, DecoderPlan, plan_decoders
from octavo.engine.media.sandbox.pool import DecoderPool, Lease
from octavo.engine.media.sandbox.slots import FairSlots
from octavo.engine.media.source import MediaAccess
from octavo.engine.media.task import MediaTask
from octavo.engine.utils import machine_memory
from octavo.engine.utils.machine_memory import Memory, available_memory

LIMITS = MediaLimits()
GOOD = encoded(noise())
CUT = encoded(noise(300, 200))[:-5000]
WANTED = {"images": 2, "videos": 2, "urls": 2}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> InputProcessor:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    return InputProcessor(folder, config, preprocess, 4096, access=MediaAccess(roots=()))


@pytest.fixture
def inputs(processor: InputProcessor) -> Iterator[InputPool]:
    pool = InputPool(processor, isolate=True)
    yield pool
    pool.close()


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    pool = DecoderPool(LIMITS, 1)
    yield pool
    pool.close()


def decoders(inputs: InputPool) -> DecoderPool:
    assert inputs._decoders is not None
    return inputs._decoders


def ask(kind: str, source: Any, **options: Any) -> Any:
    part = {"type": kind, kind: source, "min_pixels": 3136, "max_pixels": 12544, **options}
    return [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]


def finish(inputs: InputPool, prompt: Any) -> str:
    """What comes of a prompt, as the servers go about it: empty, or the error's text."""
    job = inputs.submit(ParsedPrompt.of(prompt))
    try:
        stream = job.future.result(60).stream
        if stream is not None:
            wait_for(lambda: stream.is_done, 60)
            return str(stream.error or "")
        return ""
    except InputError as error:
        return str(error)
    finally:
        job.cancel()


def decode(lease: Lease, data: bytes = GOOD) -> None:
    with lease("image", io.BytesIO(data), LIMITS, "image") as reader:
        assert len(list(reader.frames([0], 28, 28))) == 1


def pid_of(lease: Lease) -> int:
    return lease._ready_process("image").pid


REJECTED: dict[str, tuple[str, Any]] = {
    "no image": ("image", b"hello world"),
    "cut header": ("image", GOOD[:40]),
    "cut pixels": ("image", CUT),
    "server's file": ("image", "/etc/hostname"),
    "url": ("image", "http://a.org/b.png"),
    "base64": ("image", "data:image/png;base64,!!"),
    "no video": ("video", b"hello world"),
    "cut video": ("video", mp4(20)[:200]),
    "second frame": ("video", [GOOD, b"hello"]),
    "second frame's pixels": ("video", [encoded(noise(300, 200)), CUT]),
    "late frames": ("video", without_late_frames(mp4(64))),
}


@pytest.mark.lesson("L41")
@pytest.mark.parametrize("name", REJECTED)
def test_reused_helper_a_rejected_item_costs_no_decoder_start(inputs: InputPool, name: str) -> None:
    kind, source = REJECTED[name]
    assert finish(inputs, ask("image", GOOD)) == finish(inputs, ask("video", mp4(40))) == ""
    started = decoders(inputs).num_started
    for _ in range(15):
        assert finish(inputs, ask(kind, source))
        assert finish(inputs, ask("image", GOOD)) == ""
    assert decoders(inputs).num_started == started


@pytest.mark.lesson("L41")
def test_reused_helper_options_that_are_rejected_cost_no_decoder_start(
    inputs: InputPool,
) -> None:
    """After the file was opened, and while another of the request's files is."""
    assert finish(inputs, ask("image", GOOD)) == ""
    narrow = encoded(Image.new("RGB", (1, 300)))
    both = [{"role": "user", "content": [{"type": "image", "image": x} for x in (GOOD, narrow)]}]
    for _ in range(10):
        assert "one side is over" in finish(inputs, both)
        assert "nframes" in finish(inputs, ask("video", mp4(20), nframes=400))
        large = {"min_pixels": 1 << 23, "max_pixels": 1 << 24}
        assert "max_model_len" in finish(inputs, ask("image", GOOD, **large))
        assert finish(inputs, ask("image", GOOD)) == ""
    assert decoders(inputs).num_started <= 2


@pytest.mark.lesson("L41")
def test_reused_helper_an_outcome_is_known_after_the_decoder_is_given_back(
    inputs: InputPool,
) -> None:
    """So nothing that a client does next can reach it."""
    pool, lent = decoders(inputs), []
    for source in (GOOD, CUT, b"hello"):
        job = inputs.submit(ParsedPrompt.of(ask("image", source)))
        job.future.add_done_callback(lambda _: lent.append(len(pool._lent)))
        job.future.exception(60)
        job.cancel()
    assert lent == [0, 0, 0]


@pytest.mark.lesson("L41")
def test_reused_helper_cancelling_at_any_time_hurts_no_other_request(
    inputs: InputPool,
) -> None:
    prompts = [ask("image", encoded(noise(900, 700))), ask("video", mp4(60)), ask("image", CUT)]
    assert finish(inputs, prompts[0]) == finish(inputs, prompts[1]) == ""
    started = decoders(inputs).num_started
    for i, prompt in zip(range(60), itertools.cycle(prompts), strict=False):
        job = inputs.submit(ParsedPrompt.of(prompt))
        time.sleep(i * 0.001)
        job.cancel()
        assert finish(inputs, ask("image", GOOD)) == ""
    assert decoders(inputs).num_started <= started + 2  # each ends within CANCEL_SECONDS


def test_a_cancelled_request_leaves_an_idle_decoder_alone(pool: DecoderPool) -> None:
    task = MediaTask(LIMITS)
    with pool.lease(task) as lease:
        reader = lease("image", io.BytesIO(GOOD), LIMITS, "image")
        task.cancel()
        with pytest.raises(InputError, match="cancelled"):
            list(reader.frames([0], 28, 28))
        with pytest.raises(InputError, match="cancelled"):
            lease("image", io.BytesIO(GOOD), LIMITS, "image")
        reader.__exit__(None, None, None)
    with pool.lease(MediaTask(LIMITS)) as lease:
        decode(lease)
    assert pool.num_started == 1


def test_a_video_dropped_between_two_frames_leaves_its_decoder_alive(pool: DecoderPool) -> None:
    for taken in (0, 1, 5):
        task = MediaTask(LIMITS)
        with (
            pool.lease(task) as lease,
            lease("video", io.BytesIO(mp4(200)), LIMITS, "video") as reader,
        ):
            stream = reader.frames(range(200), 28, 28)
            for _ in range(taken):
                next(stream)
            task.cancel()
            with pytest.raises(InputError, match="cancelled"):
                list(stream)
        with pool.lease() as lease:
            decode(lease)
    assert pool.num_started == 1


def test_cancelling_ends_a_wait_for_a_decoder_that_does_not_answer(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CANCEL_SECONDS", 0.05)
    task = MediaTask(LIMITS)
    with pool.lease(task) as lease:
        pid = pid_of(lease)
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(0.1, task.cancel)
        timer.start()
        with pytest.raises(InputError, match="cancelled"):
            decode(lease)
        timer.join()
        assert not Path(f"/proc/{pid}").exists()
    with pool.lease() as lease:
        decode(lease)
    assert pool.num_started == 2


@pytest.mark.lesson("L41")
def test_a_request_that_waits_for_a_start_can_be_cancelled(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process, which has not worked for the request, serves the next one."""
    monkeypatch.setattr(process, "CANCEL_SECONDS", 0.05)
    start, stopped = process._start, threading.Event()

    def start_stopped(*arguments: Any) -> Any:
        child = start(*arguments)
        os.kill(child.pid, signal.SIGSTOP)
        stopped.set()
        return child

    monkeypatch.setattr(process, "_start", start_stopped)
    task, errors = MediaTask(LIMITS), []

    def open_one() -> None:
        with pool.lease(task) as lease, pytest.raises(InputError) as caught:
            decode(lease)
        errors.append(str(caught.value))

    thread = threading.Thread(target=open_one)
    thread.start()
    assert stopped.wait(30)
    task.cancel()
    thread.join(30)
    assert errors == ["image: the request was cancelled"]
    (waiting,) = pool._free
    os.kill(waiting.pid, signal.SIGCONT)
    with pool.lease() as lease:
        decode(lease)
        assert pid_of(lease) == waiting.pid and pool.num_started == 1


def test_a_decoder_that_does_not_start_is_the_servers_fault(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MODULE", "octavo.no_such_module")
    with pool.lease() as lease, pytest.raises(DecoderUnavailable) as caught:
        decode(lease)
    reason = caught.value.reason
    assert (reason.code, reason.field, reason.retryable) == ("UNAVAILABLE", "image", True)
    assert pool.num_started == 1 and not pool._free
    monkeypatch.undo()
    with pool.lease() as lease:
        decode(lease)


def test_reused_helper_a_decoder_that_died_idle_is_replaced_silently(
    pool: DecoderPool,
) -> None:
    """Also one that the kernel has yet to end: it looks alive, and takes what is sent to it."""
    for _ in range(6):
        with pool.lease() as lease:
            pid = pid_of(lease)
        os.kill(pid, signal.SIGKILL)
        with pool.lease() as lease:
            decode(lease)
            assert pid_of(lease) != pid


def test_a_decoder_that_dies_fails_the_request_whose_file_it_has(pool: DecoderPool) -> None:
    with pool.lease() as lease:
        with lease("image", io.BytesIO(GOOD), LIMITS, "image") as reader:
            os.kill(pid_of(lease), signal.SIGKILL)
            with pytest.raises(InputError, match="the decoder stopped"):
                list(reader.frames([0], 28, 28))
        decode(lease)
    with pool.lease() as lease:
        decode(lease)
    assert pool.num_started == 2


def test_a_decoder_with_an_unread_reply_is_not_reused(pool: DecoderPool) -> None:
    with pool.lease() as lease:
        first = pid_of(lease)
        assert lease._process is not None
        lease._process.is_idle = False
    with pool.lease() as lease:
        assert pid_of(lease) != first


def test_closing_the_pool_ends_decoding_and_waiting() -> None:
    pool, errors = DecoderPool(LIMITS, 1), []
    task = MediaTask(LIMITS)

    def wait() -> None:
        try:
            with pool.lease(task) as lease:
                decode(lease)
        except RuntimeError as error:
            errors.append(str(error))

    with pool.lease() as lease:
        pid = pid_of(lease)
        os.kill(pid, signal.SIGSTOP)
        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_for(lambda: bool(pool._all_slots._waiting))
        threading.Timer(0.05, pool.close).start()
        with pytest.raises(InputError, match="the decoder stopped"):
            decode(lease)
    waiting.join(10)
    assert errors == ["the pool of media decoders is closed"]
    assert not Path(f"/proc/{pid}").exists()


# Waiting for a decoder


def test_slots_are_given_in_the_order_of_requests() -> None:
    slots, order, threads = FairSlots(1), [], []
    slots.acquire(None, "x")

    def take(number: int) -> None:
        slots.acquire(MediaTask(LIMITS), "x")
        order.append(number)
        slots.release()

    for number in range(8):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        wait_for(lambda: len(slots._waiting) == len(threads))
    slots.release()
    for thread in threads:
        thread.join(10)
    assert order == list(range(8))


def test_a_request_that_waits_for_a_slot_can_be_cancelled_and_times_out() -> None:
    slots = FairSlots(1)
    slots.acquire(None, "x")
    task = MediaTask(LIMITS)
    threading.Timer(0.05, task.cancel).start()
    with pytest.raises(InputError, match="cancelled"):
        slots.acquire(task, "image")
    with pytest.raises(InputError, match="--media-timeout-s"):
        slots.acquire(MediaTask(MediaLimits(media_timeout_s=0.05)), "image")  # type: ignore[arg-type]
    assert not slots._waiting
    slots.release()
    slots.acquire(None, "x")


def test_text_waits_for_no_decoder_and_images_for_no_video(
    processor: InputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer decoders than threads."""
    memory = Memory(16 << 30, 16 << 30)
    monkeypatch.setattr("octavo.engine.input.preprocess_pool.available_memory", lambda: memory)
    inputs = InputPool(processor, isolate=True)
    pool = decoders(inputs)
    assert dict(pool.plan.lanes) == {"images": 1, "videos": 1, "urls": 1}
    with pool.lease(None, "videos") as held, pool.lease(None, "urls") as other:
        pids = pid_of(held), pid_of(other)
        video = ParsedPrompt.of(ask("video", mp4(20)))
        jobs = [inputs.submit(video) for _ in range(6)]
        wait_for(lambda: bool(pool._slots["videos"]._waiting))
        assert finish(inputs, [{"role": "user", "content": "Hi"}]) == ""
        for _ in range(4):
            assert finish(inputs, ask("image", GOOD)) == ""
        assert len({*pids}) == 2 and not any(job.future.done() for job in jobs)
    for job in jobs:
        job.future.result(60)
        job.cancel()
    inputs.close()


# Memory


@pytest.mark.parametrize("cores", [1, 2, 4, 16, 64, 256])
@pytest.mark.parametrize("limit", [600 << 20, 2 << 30, 4 << 30, 64 << 30])
def test_decoders_stay_within_a_share_of_the_memory(cores: int, limit: int) -> None:
    """8. Up to 104 decoders of 4 GiB each were started on 64 cores, whatever the memory."""
    limits, before = MediaLimits(decoder_memory_bytes=limit), 0
    wanted = PreprocessPools.of(cores).decoders()
    for gigabytes in (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 256, 2048):
        available = gigabytes << 30
        plan = plan_decoders(wanted, limits, available)
        assert plan.total_bytes <= available * MEMORY_SHARE
        assert plan.large_bytes <= limit
        assert 1 <= plan.num_large <= plan.num_decoders <= sum(wanted.values())
        assert plan.num_decoders >= before or plan.large_bytes > 2 << 30
        before = plan.num_decoders
        if not plan.are_shared:
            assert sum(plan.lanes.values()) == plan.num_decoders
            assert min(plan.lanes.values()) >= 1
    assert plan_decoders(wanted, limits, 0).num_decoders == 1


def address_space(pid: int) -> int:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(int(line.split()[3]) for line in lines if line.startswith("Max address space"))


def test_only_large_files_may_use_all_of_the_memory() -> None:
    plan = DecoderPlan(2, 1, SMALL_BYTES, 4 << 30, WANTED, are_shared=True)
    pool = DecoderPool(LIMITS, plan)
    large = encoded(Image.new("L", (5000, 4000)), "PNG")
    with pool.lease() as lease:
        decode(lease)
        assert address_space(pid_of(lease)) == SMALL_BYTES
        with lease("image", io.BytesIO(large), LIMITS, "image") as reader:
            assert address_space(pid_of(lease)) == 4 << 30
            with pool.lease() as other:
                decode(other)
            with (
                pool.lease(MediaTask(MediaLimits(media_timeout_s=1))) as other,
                pytest.raises(InputError, match="--media-timeout-s"),  # it waits
            ):
                decode(other, large)
            with pool.lease() as other:
                decode(other)
            list(reader.frames([0], 28, 28))
        pid = pid_of(lease)
    assert address_space(pid) == SMALL_BYTES
    with pool.lease() as lease:
        decode(lease, large)
    assert pool.num_started == 2
    pool.close()


WEBP_PIXELS = "c56ab10a0750e42ad4a3ff8188e87f0000"  # a plain color
WEBPS: dict[str, tuple[str, dict[str, Any]]] = {
    "lossy": ("RGB", {}),
    "lossless": ("RGBA", {"lossless": True}),
    "extended": ("RGB", {"lossless": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
}


@pytest.mark.parametrize("name", sorted(WEBPS))
def test_sizes_of_webp_images_are_read(name: str) -> None:
    mode, options = WEBPS[name]
    file = io.BytesIO(encoded(Image.new(mode, (301, 203)), "WEBP", **options))
    assert webp_header(file) == MediaHeader(203, 301) and file.tell() == 0
    assert webp_header(io.BytesIO(file.getvalue()[:29])) is None
    assert webp_header(io.BytesIO(encoded(Image.new("RGB", (9, 9)), "PNG"))) is None


def test_a_webp_image_of_the_maximum_size_fits_into_a_large_decoder() -> None:
    """Opening it allocates two canvases, before the decoder returns its header."""
    pool = DecoderPool(LIMITS, DecoderPlan(1, 1, SMALL_BYTES, 4 << 30, WANTED, are_shared=True))
    size = 10_950, 10_950
    data = b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0/" + bytes.fromhex(WEBP_PIXELS)
    with pool.lease() as lease, lease("image", io.BytesIO(data), LIMITS, "image") as reader:
        assert reader.header == MediaHeader(*size)
    pool.close()


@pytest.mark.slow
def test_images_up_to_16_megapixels_fit_into_a_small_decoder() -> None:
    plan = DecoderPlan(1, 1, SMALL_BYTES, SMALL_BYTES, WANTED, are_shared=True)
    pool, size = DecoderPool(LIMITS, plan), (4096, 4096)
    files = [
        encoded(Image.new("RGBA", size, (1, 2, 3, 4)), "PNG", compress_level=1),
        encoded(Image.new("F", size), "TIFF"),
        encoded(Image.new("RGBA", size, (1, 2, 3, 4)), "WEBP", lossless=True, method=0),
        encoded(Image.new("CMYK", size), "JPEG", progressive=True),
    ]
    with pool.lease() as lease:
        for data in files:
            decode(lease, data)
    pool.close()


CGROUPS = {
    # name: (/proc/self/cgroup, GB by file, (available, total) GB)
    "version 2": ("0::/\n", {"memory.max": 8, "memory.current": 3}, (6, 8)),
    "version 2, below": (
        "0::/a/b\n",
        {"a/memory.max": 9, "a/memory.current": 5, "a/b/memory.max": "max"},
        (5, 9),
    ),
    "version 2, of many": (
        "0::/a/b\n",
        {"a/memory.max": 9, "a/b/memory.max": 7, "a/b/memory.current": 2},
        (6, 7),
    ),
    "version 1": (
        "3:cpu:/x\n4:memory:/a\n0::/\n",
        {"memory/a/memory.limit_in_bytes": 8, "memory/a/memory.usage_in_bytes": 3},
        (5, 8),
    ),
    "no limit": ("4:memory:/\n", {"memory/memory.limit_in_bytes": (1 << 63) - 4096}, (20, 32)),
    "none": ("", {}, (20, 32)),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_available_memory_is_that_of_the_cgroups(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gigabyte = 1 << 30
    own, files, expected = CGROUPS[name]
    for path, number in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        text = str(number * gigabyte if isinstance(number, int) and number < 99 else number)
        (tmp_path / path).write_text(text)
    if name != "version 1":  # file contents that the kernel can drop do not count
        for folder in {(tmp_path / path).parent for path in files}:
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {gigabyte}\n")
    (tmp_path / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 20971520 kB\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine_memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path)
    found = available_memory()
    assert (found.bytes, found.total_bytes) == tuple(each * gigabyte for each in expected)
