"""A video's prefill starts while its later frames are still being decoded."""

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import octavo
from octavo.benchmarks.fakes.simulated_worker import Simulation, make_config, make_request
from octavo.benchmarks.media.cases import SHAPE, encoded, mp4, noise
from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.input.parsed_prompt import ParsedPrompt, PromptSize
from octavo.engine.input.preprocess_pool import InputPool
from octavo.engine.media.decode.image import ImageFile
from octavo.engine.media.decode.opening import open_here
from octavo.engine.media.decode.video import VideoFile
from octavo.engine.media.loader import MediaLoader
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.source import MediaAccess, open_source
from octavo.engine.media.task import MediaTask
from octavo.engine.media.token_budget import MediaTokenBudget
from octavo.scheduler.errors import QueueFull
from octavo.scheduler.request import Request

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=6)
CAT, DOG = b"c" * 32, b"d" * 32


def ask(video: Any, text: str = "What is it?") -> list[dict[str, Any]]:
    options = {} if isinstance(video, list) else {"nframes": 12}
    parts = [{"type": "video", "video": video, **options}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def unmade(name: str, hashes: list[bytes], num_ready: int = 1) -> Request:
    """20 tokens: 4 of text, then a unit of 4 tokens for each of up to 3 hashes, then text."""
    tokens = [7, 8, 9, 10, *[49] * 12, 11, 12, 13, 14]
    request = make_request(name, tokens, *((4 + 4 * i, 4, each) for i, each in enumerate(hashes)))
    named, request.units = request.units, ()
    request.units = tuple(
        unit if i < num_ready else type(unit)(b"", *[getattr(unit, n) for n in FIELDS])
        for i, unit in enumerate(named)
    )
    request.supply([])
    return request


def supply(simulation: Simulation, name: str, hashes: list[bytes]) -> None:
    simulation.scheduler.requests[name].supply(hashes)


FIELDS = ("index", "offset", "num_tokens", "num_patches")


def test_tokens_are_computed_up_to_the_first_unit_that_is_not_made() -> None:
    simulation = Simulation(make_config())
    request = unmade("a", [CAT, DOG, CAT])
    simulation.scheduler.add(request)
    plan = simulation.step()
    assert plan is not None and plan.num_scheduled_tokens == (8,) and plan.samples == (False,)
    plan = simulation.step()
    assert plan is not None and plan.is_empty  # nothing to do: that is no dead end
    for _ in range(300):
        simulation.step()
    supply(simulation, "a", [DOG])
    plan = simulation.step()
    assert plan is not None and plan.num_computed_tokens == (8,)
    assert (plan.num_scheduled_tokens, plan.samples) == ((4,), (False,))
    supply(simulation, "a", [CAT])
    plan = simulation.step()
    assert plan is not None and (plan.num_scheduled_tokens, plan.samples) == ((8,), (True,))
    simulation.run()


def test_others_run_while_one_waits_for_its_frames() -> None:
    simulation = Simulation(make_config(max_num_seqs=2))
    simulation.scheduler.add(unmade("a", [CAT, DOG]))
    simulation.scheduler.add(make_request("b", 30))
    for _ in range(20):
        simulation.step()
    assert list(simulation.scheduler.requests) == ["a"] and "b" in simulation.ended
    supply(simulation, "a", [DOG])
    simulation.run()


def test_who_waits_for_blocks_of_one_that_waits_for_frames_is_not_failed() -> None:
    simulation = Simulation(make_config(num_blocks=9, block_size=4))
    simulation.scheduler.add(unmade("a", [CAT, DOG]))
    simulation.step()
    simulation.scheduler.add(make_request("b", 30))
    for _ in range(300):
        simulation.step()
    assert set(simulation.scheduler.requests) == {"a", "b"}
    supply(simulation, "a", [DOG])
    simulation.run()


def test_a_video_seen_before_waits_until_it_knows_how_much_is_cached() -> None:
    """What is made of it is all cached: nothing is computed until more of it is made, so that the
    whole prefix is found."""
    simulation = Simulation(make_config(block_size=4))
    simulation.scheduler.add(unmade("a", [CAT, DOG, CAT], num_ready=3))
    simulation.run()
    again = unmade("b", [CAT, DOG, CAT])
    simulation.scheduler.add(again)
    for media_hash in (DOG, CAT):
        plan = simulation.step()
        assert plan is not None and plan.is_empty
        supply(simulation, "b", [media_hash])
    simulation.run()
    assert again.num_cached_tokens == 19  # all but the one whose logits are wanted
    other = unmade("c", [CAT, CAT, CAT])  # differs from its second unit on
    simulation.scheduler.add(other)
    for _ in range(2):
        supply(simulation, "c", [CAT])
    simulation.run()
    assert other.num_cached_tokens == 8


class Gate:
    """Frames of a video come up to a place, and on once it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.opened, self.reached, self.most = threading.Event(), threading.Event(), most
        self.num_frames = 0
        self.error = ""
        frames = VideoFile.frames

        def gated(reader: VideoFile, *args: Any) -> Iterator[Any]:
            for count, frame in enumerate(frames(reader, *args)):
                if count == self.most:
                    self.reached.set()
                    assert self.opened.wait(60)
                    if self.error:
                        raise InputError("video", self.error)
                self.num_frames += 1
                yield frame

        monkeypatch.setattr(VideoFile, "frames", gated)


@pytest.fixture(scope="module")
def engine() -> Iterator[octavo.AsyncLLM]:
    with octavo.AsyncLLM(dtype="float32", max_unit_temporal_patches=1) as made:
        yield made


async def collect(engine: octavo.AsyncLLM, messages: Any, **more: Any) -> list[int]:
    return [token async for d in engine.chat(messages, GREEDY, **more) for token in d.token_ids]


async def wait_until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def test_prefill_starts_while_frames_are_decoded(
    engine: octavo.AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the tokens that it gives when the video was made whole first; so does the cache."""
    clip = mp4(24, size=(112, 84))

    async def run() -> None:
        whole = engine.engine.preprocess(ask(clip))
        assert whole.stream is None and len(whole.units) == 6
        expected = [
            token
            async for delta in engine.generate(whole, GREEDY, cache_salt="alone")
            for token in delta.token_ids
        ]
        gate = Gate(monkeypatch, most=7)
        task = asyncio.create_task(collect(engine, ask(clip)))
        scheduler = engine.engine.scheduler
        await wait_until(lambda: any(r.num_computed_tokens for r in scheduler.running))
        (request,) = scheduler.running
        assert request.awaits_media and not gate.opened.is_set()
        assert await collect(engine, ask([noise()] * 2)) != []  # others are answered meanwhile
        gate.opened.set()
        assert await task == expected
        assert await collect(engine, ask(clip)) == expected

    asyncio.run(run())


def test_a_video_that_breaks_later_ends_its_request_alone(
    engine: octavo.AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        gate = Gate(monkeypatch, most=6)
        gate.error = "the video is corrupt: it cannot be decoded"
        stream = engine.chat(ask(mp4(26)), GREEDY)
        task = asyncio.create_task(anext(stream))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        gate.opened.set()
        delta = await task
        assert delta.finish_reason == "error" and delta.token_ids == ()
        assert delta.error == "INVALID_ARGUMENT: video: the video is corrupt: it cannot be decoded"
        assert not engine.engine.has_requests
        assert await collect(engine, ask([noise()] * 2)) != []

    asyncio.run(run())


@pytest.mark.parametrize("how", ["abort", "close", "timeout"])
def test_nothing_more_is_decoded_of_a_request_that_is_over(
    engine: octavo.AsyncLLM, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def run() -> None:
        gate = Gate(monkeypatch, most=4)
        timeout = {"timeout_s": 1.0} if how == "timeout" else {}
        stream = engine.chat(ask(mp4(28)), GREEDY, request_id="gone", **timeout)
        task = asyncio.create_task(anext(stream))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        await wait_until(lambda: engine.engine.has_requests)
        if how == "abort":
            assert await engine.abort("gone")
        elif how == "close":
            task.cancel()
            await asyncio.wait([task])
            await stream.aclose()
        await wait_until(lambda: not engine.engine.has_requests)
        if how != "close":
            assert (await task).finish_reason == ("abort" if how == "abort" else "error")
            await stream.aclose()
        gate.opened.set()
        await asyncio.sleep(0.2)
        assert gate.num_frames <= 6  # of 12: the unit in hand, no more

    asyncio.run(run())


def test_answers_of_one_prompt_share_its_frames(engine: octavo.AsyncLLM) -> None:
    params = octavo.SamplingParams(temperature=0, max_tokens=6, n=3)

    async def run() -> None:
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        async for delta in engine.chat(ask(mp4(30)), params):
            tokens[delta.index] += delta.token_ids
        assert tokens[0] == tokens[1] == tokens[2] == await collect(engine, ask(mp4(30)))

    asyncio.run(run())


def test_the_engine_alone_makes_the_input_whole() -> None:
    """A stack with a loop of its own gives the prompt itself; nothing is left to a pool."""
    with octavo.Engine(dtype="float32", max_unit_temporal_patches=1) as engine:
        engine.add_request("a", ask(mp4(24)), GREEDY)
        tokens: list[int] = []
        while engine.has_requests:
            tokens += [token for delta in engine.step() for token in delta.token_ids]
        assert tokens


def test_bytes_that_wait_are_bounded(engine: octavo.AsyncLLM) -> None:
    """What is in hand counts; one prompt alone may be larger; what is done or dropped is let go."""
    begun, goes_on = threading.Event(), threading.Event()

    class Slow:
        limits = MediaLimits()

        def begin(self, prompt: Any, task: Any) -> Any:
            begun.set()
            assert goes_on.wait(30)
            raise InputError("prompt", "bad")

    pool = InputPool(Slow(), max_bytes=100)  # type: ignore[arg-type]
    first = pool.submit(ParsedPrompt.of(ask(b"x" * 150)))
    assert begun.wait(30)
    with pytest.raises(QueueFull, match=r"150 bytes.*60 more exceed max_queue_bytes=100"):
        pool.submit(ParsedPrompt.of(ask([b"x" * 30] * 2)))
    pool.submit(ParsedPrompt.of("no media")).cancel()
    goes_on.set()
    with pytest.raises(InputError):
        first.future.result(30)
    with pytest.raises(QueueFull):  # until its request is over, its message is there
        pool.submit(ParsedPrompt.of(ask(b"x" * 90)))
    first.cancel()
    pool.submit(ParsedPrompt.of(ask(b"x" * 90))).cancel()
    last = pool.submit(ParsedPrompt.of({"prompt": "x", "images": [b"x" * 90]}))
    assert isinstance(last.future.exception(30), InputError)
    pool.close()


@pytest.mark.parametrize(
    ("prompt", "size"),
    [
        (ask(b"123"), 3),
        (ask([b"12", "data:,"]), 8),
        ({"prompt": "x", "images": [np.zeros((2, 2, 3), np.uint8)]}, 12),
        ({"prompt": "x", "images": [{"image": b"1234"}], "videos": ()}, 4),
        (ask(noise()), 0),
        (ask(None), 0),
    ],
)
def test_bytes_of_a_prompt(prompt: Any, size: int) -> None:
    assert PromptSize.of(ParsedPrompt.of(prompt)).source_bytes == size


@pytest.mark.parametrize(
    ("prompt", "lane"),
    [
        (ask(b""), "videos"),
        ({"messages": ask(b"")}, "videos"),
        ({"prompt": "x", "videos": [b""]}, "videos"),
        ({"prompt": "x", "images": [b""], "videos": None}, "images"),
        ({"prompt": "x", "images": ["HTTPS://a.org/b"], "videos": [b""]}, "urls"),
        (ask([b"", "http://a.org/b"]), "urls"),
        ("a video at http://a.org", "text"),
        ([{"role": "user", "content": "video"}], "text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "images"),
    ],
)
def test_each_kind_of_prompt_has_its_lane(prompt: Any, lane: str) -> None:
    assert PromptSize.of(ParsedPrompt.of(prompt)).lane == lane


def test_text_waits_for_no_image(engine: octavo.AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, frames = threading.Event(), ImageFile.frames

    def slow(reader: ImageFile, *args: Any) -> Iterator[Any]:
        assert goes_on.wait(60)
        yield from frames(reader, *args)

    monkeypatch.setattr(ImageFile, "frames", slow)
    picture = [{"role": "user", "content": [{"type": "image", "image": noise()}]}]

    async def run() -> None:
        held = [asyncio.create_task(collect(engine, picture)) for _ in range(40)]
        assert await collect(engine, [{"role": "user", "content": "Hi"}])
        assert not any(task.done() for task in held)
        goes_on.set()
        await asyncio.gather(*held)

    asyncio.run(run())


def test_a_request_that_is_over_stops_at_once() -> None:
    """Between its items, and what it waits for is told to end."""
    opened: list[str] = []
    stopped, goes_on = threading.Event(), threading.Event()

    def slow(kind: str, *args: Any) -> Any:
        opened.append(kind)
        assert goes_on.wait(30)
        return open_here(kind, *args)

    loader = MediaLoader(PreprocessConfig(), SHAPE, MediaAccess(), MediaLimits())
    room = MediaTokenBudget(9000, 0, 8, SHAPE.factor)
    task = MediaTask(MediaLimits(), slow)
    error: list[InputError] = []

    def work() -> None:
        try:
            with task.watched(stopped.set):
                for _ in range(8):
                    loader.open("image", encoded(noise()), MediaOptions(), room, "image", task)
        except InputError as found:
            error.append(found)

    thread = threading.Thread(target=work)
    thread.start()
    while not opened:
        time.sleep(0.01)
    task.cancel()
    assert stopped.wait(5)
    goes_on.set()
    thread.join(30)
    assert opened == ["image"] and "the request was cancelled" in str(error[0])
    task.close()


def test_the_time_of_a_request_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("octavo.engine.media.task.time.monotonic", lambda: now[0])
    task = MediaTask(MediaLimits(media_timeout_s=60))
    now[0] += 59
    assert task.seconds_left("image") == pytest.approx(1)
    now[0] += 1
    with pytest.raises(InputError, match=r"not ready after 60 seconds.*--media-timeout-s"):
        task.seconds_left("image")


def test_the_bytes_of_a_request_are_bounded_together() -> None:
    task = MediaTask(MediaLimits(max_media_bytes=250))
    for _ in range(2):
        open_source(b"x" * 100, MediaAccess(), "image", task)
    uri = "data:image/png;base64," + base64.b64encode(b"x" * 100).decode()
    with pytest.raises(InputError, match=r"300 bytes of files in one request.*--max-media-bytes"):
        open_source(uri, MediaAccess(), "image", task)


@pytest.mark.parametrize("wrong", ["é", "A", "AA=A", "A===", "*", "\ud800"])
def test_what_is_no_base64_is_reported_in_our_words(wrong: str) -> None:
    with pytest.raises(InputError) as caught:
        open_source(
            f"data:image/png;base64,{wrong}", MediaAccess(), "image", MediaTask(MediaLimits())
        )
    assert (
        str(caught.value) == "image: the data after 'base64,' in the data URI is not valid base64"
    )


def test_a_path_that_is_none_is_reported_in_our_words() -> None:
    with pytest.raises(InputError, match=r"image: '.*': is not a valid path$"):
        open_source("/a\0b", MediaAccess(roots=None), "image", MediaTask(MediaLimits()))


def test_a_pool_that_is_closed_ends_what_is_under_way() -> None:
    begun, ended = threading.Event(), threading.Event()

    class Waits:
        limits = MediaLimits()

        def begin(self, prompt: Any, task: MediaTask) -> Any:
            with task.watched(ended.set):
                begun.set()
                assert ended.wait(30)
                task.seconds_left("image")

    pool = InputPool(Waits())  # type: ignore[arg-type]
    job = pool.submit(ParsedPrompt.of(ask(b"x")))
    assert begun.wait(30)
    pool.close()
    with pytest.raises(InputError, match="cancelled"):
        job.future.result(30)
