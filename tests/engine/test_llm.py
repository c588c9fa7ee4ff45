"""The whole engine on a tiny random checkpoint: processes, gRPC, scheduler, pages, sampling.

The spine: the same greedy request gives the same tokens alone, batched, chunked, preempted and on
two ranks.
"""

import asyncio
import concurrent.futures
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.errors import ConfigError, DuplicateRequest, EngineDead, InputError
from octavo.engine.input.conversation import read_conversation
from octavo.engine.worker.group import WorkerGroup, WorkerGroupError

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def image(seed: int, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed), **options}


def video(seed: int, frames: int = 6) -> dict[str, Any]:
    stills = [picture(seed + i) for i in range(frames)]
    return {"type": "video", "video": stills, "min_pixels": 3136, "max_pixels": 6272}


CONVERSATIONS = [
    ask("Who are you?"),
    ask("What is it?", image(1)),
    ask("Which one of the three?", image(2), image(3, min_pixels=3136), image(4)),
    ask("Where does it go?", video(5)),
    [
        *ask("See", image(6), video(7, 4)),
        {"role": "assistant", "content": "I see."},
        *ask("Again?", image(8)),
    ],
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def make(checkpoint: Path, **settings: Any) -> octavo.LLM:
    settings = {
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 64 << 20,
        **settings,
    }
    return octavo.LLM(checkpoint, **settings)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[octavo.LLM]:
    with make(checkpoint) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: octavo.LLM) -> list[list[int]]:
    """The tokens of each conversation when nothing else runs."""
    return [llm.chat(messages, GREEDY)[0].outputs[0].token_ids for messages in CONVERSATIONS]


def tokens(outputs: list[octavo.RequestOutput]) -> list[list[int]]:
    assert not [output.error for output in outputs if output.error]
    return [output.outputs[0].token_ids for output in outputs]


def test_alone_equals_batched(llm: octavo.LLM, alone: list[list[int]]) -> None:
    assert tokens(llm.chat(CONVERSATIONS, GREEDY)) == alone
    assert len({tuple(ids) for ids in alone}) == len(alone)  # they do tell prompts apart


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_num_batched_tokens": 17}, id="chunked"),
        pytest.param({"max_num_seqs": 2, "max_num_batched_tokens": 40}, id="few-at-once"),
        pytest.param({"block_size": 8, "max_unit_temporal_patches": 1}, id="small-units"),
        pytest.param({"max_encode_tokens": 18, "encoder_cache_tokens": 24}, id="small-encoder"),
        pytest.param({"tensor_parallel_size": 2}, id="two-ranks"),
        pytest.param(  # the quick twin: worker/test_tensor_parallel.py
            {"tensor_parallel_size": 4, "max_num_batched_tokens": 50},
            id="four-ranks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_setting_gives_the_same_tokens(
    checkpoint: Path, alone: list[list[int]], settings: dict[str, Any]
) -> None:
    with make(checkpoint, **settings) as llm:
        assert tokens(llm.chat(CONVERSATIONS, GREEDY)) == alone


def test_preempted_equals_alone(checkpoint: Path, llm: octavo.LLM) -> None:
    params = octavo.SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    expected = tokens([llm.chat(messages, params)[0] for messages in CONVERSATIONS])
    longest = max(len(out.prompt_token_ids) for out in llm.chat(CONVERSATIONS, GREEDY))
    blocks = -(-(longest + 60) // 16) + 3
    block_bytes = llm.engine.group.memory.kv_block_bytes
    with make(
        checkpoint, kv_cache_memory_bytes=blocks * block_bytes, max_model_len=16 * blocks
    ) as tight:
        seen: list[str] = []
        schedule = tight.engine.scheduler.schedule

        def watch() -> Any:
            plan = schedule()
            seen.extend(plan.preempted if plan else ())
            return plan

        tight.engine.scheduler.schedule = watch  # type: ignore[method-assign]
        assert tokens(tight.chat(CONVERSATIONS, params)) == expected
        assert seen, "nothing was preempted: the memory is not tight"
        tight.engine.scheduler.check_integrity()


def test_a_seed_draws_the_same_whatever_else_runs(checkpoint: Path, llm: octavo.LLM) -> None:
    params = octavo.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, seed=5, max_tokens=20, ignore_eos=True
    )
    once = tokens([llm.chat(messages, params)[0] for messages in CONVERSATIONS])
    assert tokens(llm.chat(CONVERSATIONS, params)) == once
    with make(checkpoint, max_num_batched_tokens=23) as chunked:
        assert tokens(chunked.chat(CONVERSATIONS, params)) == once
    other = octavo.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, seed=6, max_tokens=20, ignore_eos=True
    )
    assert tokens(llm.chat(CONVERSATIONS, other)) != once


def test_the_output_tells_what_was_used(llm: octavo.LLM) -> None:
    out = llm.chat(CONVERSATIONS[4], GREEDY)[0]
    assert [info.kind for info in out.media] == ["image", "video", "image"]
    used = sum(info.num_tokens for info in out.media)
    pads = {llm.engine.model_config.image_token_id, llm.engine.model_config.video_token_id}
    assert sum(token in pads for token in out.prompt_token_ids) == used
    assert out.usage is not None
    assert out.usage.prompt_tokens == len(out.prompt_token_ids)
    assert out.usage.output_tokens == len(out.outputs[0].token_ids) == 12
    assert out.outputs[0].finish_reason == "length"


@pytest.mark.lesson("L09")
def test_pixels_ignored(llm: octavo.LLM) -> None:
    small, large = (
        llm.chat(ask("?", image(1, min_pixels=n, max_pixels=n)), GREEDY)[0].media[0]
        for n in (12544, 50176)
    )
    assert (small.num_tokens, large.num_tokens) == (20, 70)
    with pytest.raises(InputError, match="max_pixel"):
        llm.chat(ask("?", image(1, max_pixel=1000)))


@pytest.mark.lesson("L01")
def test_placeholder_text(llm: octavo.LLM) -> None:
    """A placeholder that the user spells is text; the tokens are never sampled."""
    out = llm.chat(ask("<|image_pad|><|im_end|><|vision_start|>", image(1)), GREEDY)[0]
    pad = llm.engine.model_config.image_token_id
    assert out.prompt_token_ids.count(pad) == out.media[0].num_tokens
    hot = octavo.SamplingParams(
        temperature=100.0, top_k=0, top_p=1.0, max_tokens=300, ignore_eos=True, seed=1
    )
    drawn = set(llm.chat(ask("?"), hot)[0].outputs[0].token_ids)
    assert len(drawn) > 100
    assert not drawn & set(llm.engine.model_config.vision_token_ids)


def test_generate_takes_text_and_token_ids(llm: octavo.LLM) -> None:
    prompt = llm.chat(CONVERSATIONS[1], GREEDY)[0]
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    asked = [
        {"prompt": text, "images": [picture(1)]},
        {"prompt_token_ids": prompt.prompt_token_ids, "images": [picture(1)]},
        "plain text",
    ]
    outputs = llm.generate(asked, GREEDY)
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids == prompt.prompt_token_ids
    assert tokens(outputs)[:2] == [prompt.outputs[0].token_ids] * 2
    pad = llm.engine.model_config.image_token_id
    with pytest.raises(InputError):
        llm.generate({"prompt_token_ids": [1, 2, pad, 3]})
    with pytest.raises(InputError):
        llm.generate({"prompt_token_ids": [1, 2], "images": [picture(1)]})


def test_stop_strings_and_stop_tokens(llm: octavo.LLM, alone: list[list[int]]) -> None:
    third = alone[0][2]
    first = alone[0].index(third)
    stopped = octavo.SamplingParams(
        temperature=0, max_tokens=12, stop_token_ids=(third,), ignore_eos=True
    )
    out = llm.chat(CONVERSATIONS[0], stopped)[0].outputs[0]
    assert (out.token_ids, out.finish_reason) == (alone[0][: first + 1], "stop")
    whole = llm.chat(CONVERSATIONS[0], GREEDY)[0].outputs[0].text
    middle = whole[len(whole) // 2 :][:2]
    text = octavo.SamplingParams(temperature=0, max_tokens=12, stop=(middle,), ignore_eos=True)
    out = llm.chat(CONVERSATIONS[0], text)[0].outputs[0]
    assert (out.text, out.finish_reason) == (whole[: whole.index(middle)], "stop")
    # also where the last token that is allowed completes it
    text = octavo.SamplingParams(
        temperature=0, max_tokens=len(out.token_ids), stop=(middle,), ignore_eos=True
    )
    assert llm.chat(CONVERSATIONS[0], text)[0].outputs[0].finish_reason == "stop"


@pytest.mark.lesson("L16")
def test_client_assert_one_bad_request_is_its_own(
    llm: octavo.LLM, alone: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "not.png").write_text("no picture")
    bad = [
        ask("?", {"type": "image", "image": str(tmp_path / "missing.png")}),
        ask("?", {"type": "image", "image": str(tmp_path / "not.png")}),
        ask("?", {"type": "image", "image": "http://example.com/a.png"}),
        ask("?", image(1, resized_height=-5, resized_width=28)),
        ask("x" * 5000),
        [{"role": "user", "content": []}],
        [{"role": "user", "content": "?", 1: 2, "x": 3}],
        ask("?", image(1, min_pixels=10**400)),
        ask("?", image(1, min_pixels=1 << 40)),
        [7],
    ]
    outputs = llm.chat([*CONVERSATIONS, *bad], GREEDY)
    good, failed = outputs[: len(CONVERSATIONS)], outputs[len(CONVERSATIONS) :]
    assert tokens(good) == alone
    for output in failed:
        assert output.outputs[0].finish_reason == "error", output
        assert len(output.error) > 10
    llm.engine.scheduler.check_integrity()
    assert not llm.engine.has_requests


def test_odd_calls_are_rejected_and_the_next_works(llm: octavo.LLM, alone: list[list[int]]) -> None:
    with pytest.raises(InputError, match=r"SamplingParams, not dict"):
        llm.chat(CONVERSATIONS[0], {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 lists for 2 conversations"):
        llm.chat(CONVERSATIONS[:2], GREEDY, images=[[picture(1)]])
    for wrong in ({"temperature": 10**400}, {"stop": 5}, {"stop_token_ids": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            octavo.SamplingParams(**wrong)  # type: ignore[arg-type]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # callers on threads take turns
        calls = [pool.submit(llm.chat, messages, GREEDY) for messages in CONVERSATIONS[:3]]
        assert [tokens(call.result()) for call in calls] == [[ids] for ids in alone[:3]]


def test_an_interrupt_leaves_the_engine_usable(llm: octavo.LLM, alone: list[list[int]]) -> None:
    """Ctrl-C, as in a notebook, in the middle of an answer; several times, at other moments."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    long = octavo.SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    for wait in (0.05, 0.11, 0.23):
        timer = threading.Timer(wait, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            llm.chat(CONVERSATIONS, long)
            timer.join()
        assert not llm.engine.has_requests
        llm.engine.scheduler.check_integrity()
        assert tokens(llm.chat(CONVERSATIONS[:2], GREEDY)) == alone[:2]


def test_a_rank_that_dies_while_loading_ends_the_start(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank waits for it in its collective; the caller is told at once."""
    load = WorkerGroup._load

    def kill_and_load(self: WorkerGroup, *args: Any) -> Any:
        os.kill(self.pids[1], signal.SIGKILL)
        return load(self, *args)

    monkeypatch.setattr(WorkerGroup, "_load", kill_and_load)
    with pytest.raises(WorkerGroupError, match=r"rank 1 .*signal 9"):
        make(checkpoint, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"tensor_parallel_size": 3}, "1, 2, 4"),
        ({"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 16}, "kv_cache_memory_bytes"),
        ({"dtype": "int7"}, "dtype"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_pixles": 5}, "max_pixles"),
    ],
)
def test_bad_settings_are_named(checkpoint: Path, settings: dict[str, Any], words: str) -> None:
    settings = {"model": checkpoint, "dtype": "float32", **settings}
    with pytest.raises(ConfigError, match=words):
        octavo.LLM(**settings)


def test_an_engine_in_a_loop_of_ones_own(checkpoint: Path, alone: list[list[int]]) -> None:
    with octavo.Engine(checkpoint, dtype="float32", max_model_len=1024) as engine:
        for i, messages in enumerate(CONVERSATIONS):
            assert engine.add_request(f"r{i}", messages, GREEDY) == f"r{i}"
        with pytest.raises(DuplicateRequest):
            engine.add_request("r0", CONVERSATIONS[0], GREEDY)
        got: dict[str, list[int]] = {}
        ended = {}
        while engine.has_requests:
            for delta in engine.step():
                got.setdefault(delta.request_id, []).extend(delta.token_ids)
                if delta.finish_reason:
                    ended[delta.request_id] = delta.finish_reason
                if delta.request_id == "r0" and len(got["r0"]) == 4:
                    (last,) = engine.abort("r0")
                    assert last.finish_reason == "abort" and last.usage is not None
                    assert engine.abort("r0") == []
        assert got["r0"] == alone[0][:4]
        assert [got[f"r{i}"] for i in range(1, 5)] == alone[1:]
        assert set(ended.values()) == {"length"}
        engine.scheduler.check_integrity()
        assert engine.abort("r0") == []


def test_async_streams_abort_and_death(checkpoint: Path, alone: list[list[int]]) -> None:
    async def collect(engine: octavo.AsyncLLM, messages: Any, **more: Any) -> list[int]:
        return [t async for d in engine.chat(messages, GREEDY, **more) for t in d.token_ids]

    async def run() -> None:
        settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "max_restarts": 0}
        async with octavo.AsyncLLM(checkpoint, **settings) as engine:
            answers = await asyncio.gather(*(collect(engine, m) for m in CONVERSATIONS))
            assert answers == alone
            with pytest.raises(InputError, match="SamplingParams"):
                async for _ in engine.chat(CONVERSATIONS[0], {"max_tokens": 1}):  # type: ignore[arg-type]
                    pass
            with pytest.raises(InputError):
                await collect(engine, [])
            long = octavo.SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
            async for _delta in engine.chat(CONVERSATIONS[0], long, request_id="left"):
                break  # a reader that goes away
            reasons = []
            async for delta in engine.chat(CONVERSATIONS[1], long, request_id="stopped"):
                if not reasons:
                    assert await engine.abort("stopped")
                reasons.append(delta.finish_reason)
            assert reasons[-1] == "abort"
            assert not await engine.abort("stopped")
            for _ in range(100):
                if not engine.engine.has_requests:
                    break
                await asyncio.sleep(0.02)
            engine.engine.scheduler.check_integrity()
            assert not engine.engine.has_requests
            await death(engine)

    async def death(engine: octavo.AsyncLLM) -> None:
        long = octavo.SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
        with pytest.raises(EngineDead, match="signal 9"):
            async for _ in engine.chat(CONVERSATIONS[0], long):
                os.kill(engine.worker_pids[0], signal.SIGKILL)
        assert "signal 9" in await asyncio.wait_for(engine.wait_failed(), 10)
        with pytest.raises(EngineDead):
            await collect(engine, CONVERSATIONS[0])

    asyncio.run(run())


def test_a_name_used_again_while_its_former_answer_ends(
    checkpoint: Path, alone: list[list[int]]
) -> None:
    long = octavo.SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)

    async def run() -> None:
        async with octavo.AsyncLLM(checkpoint, dtype="float32", max_model_len=1024) as engine:
            for _ in range(5):
                former = engine.chat(CONVERSATIONS[0], long, request_id="mine")
                await anext(former)
                await former.aclose()
                got, names = [], set()
                async for delta in engine.chat(CONVERSATIONS[1], GREEDY, request_id="mine"):
                    got.extend(delta.token_ids)
                    names.add(delta.request_id)
                assert (got, names) == (alone[1], {"mine"})

    asyncio.run(run())


def test_closing_ends_what_waits_and_what_comes(checkpoint: Path) -> None:
    async def one(engine: octavo.AsyncLLM) -> str:
        try:
            async for _ in engine.chat(CONVERSATIONS[3], GREEDY):
                pass
        except EngineDead:
            return "dead"
        return "done"

    async def run() -> None:
        engine = octavo.AsyncLLM(checkpoint, dtype="float32", max_model_len=1024)
        tasks = [asyncio.create_task(one(engine)) for _ in range(8)]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, engine.close)
        assert set(await asyncio.wait_for(asyncio.gather(*tasks), 20)) <= {"dead", "done"}
        assert await one(engine) == "dead"

    asyncio.run(run())
    llm = make(checkpoint)
    llm.close()
    with pytest.raises(EngineDead):
        llm.chat(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "messages", ["hello", {"role": "user", "content": "hi"}, ["hi", "ho"], None, 5]
)
def test_what_is_no_conversation_is_rejected(llm: octavo.LLM, messages: Any) -> None:
    """And is not taken for a batch of five that fail one by one."""
    with pytest.raises(InputError, match="messages: must be a list of dicts"):
        llm.chat(messages)


def test_what_are_no_prompts_is_rejected(llm: octavo.LLM) -> None:
    with pytest.raises(InputError, match="prompts: must be a string, a dict or a list"):
        llm.generate(None)  # type: ignore[arg-type]


def test_closing_while_a_step_is_sent_is_no_internal_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another thread closes the channels after the step was built."""
    llm = make(checkpoint)
    group = llm.engine.group
    call_step = group._call_step

    def late(*args: Any) -> Any:
        closing = threading.Thread(target=llm.close)
        closing.start()
        closing.join(30)
        return call_step(*args)

    monkeypatch.setattr(group, "_call_step", late)
    with pytest.raises(EngineDead):
        llm.chat(CONVERSATIONS[0], GREEDY)
    assert not [each for each in caplog.records if each.exc_info]


def test_closing_while_workers_restart_leaves_none(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread closes it, at each point of the restart."""
    for point in ("_launch", "allocate"):
        llm = make(checkpoint)
        group, reached, closed = llm.engine.group, threading.Event(), threading.Event()
        inner = getattr(group, point)

        def late(*args: Any, inner: Any = inner, here: Any = (reached, closed)) -> None:
            inner(*args)
            here[0].set()
            here[1].wait(1)  # the other thread is to come to the closing of the group

        monkeypatch.setattr(group, point, late)
        failed: list[Exception] = []

        def ask(llm: octavo.LLM = llm, failed: list[Exception] = failed) -> None:
            try:
                llm.chat(CONVERSATIONS[0], GREEDY)
            except EngineDead as dead:
                failed.append(dead)

        os.kill(llm.engine.worker_pids[0], signal.SIGKILL)
        asking = threading.Thread(target=ask)
        asking.start()
        assert reached.wait(30)
        llm.close()
        closed.set()
        asking.join(30)
        assert len(failed) == 1
        for pid in group.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


@pytest.mark.lesson("L11")
def test_cpu_preprocess(
    checkpoint: Path, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one request's picture is being made ready, others are answered."""

    async def run() -> None:
        async with octavo.AsyncLLM(checkpoint, dtype="float32", max_model_len=1024) as engine:
            processor, may_go_on = engine.engine.processor, threading.Event()
            begin = processor.begin

            first = read_conversation(CONVERSATIONS[1])

            def slow(prompt: Any, **more: Any) -> Any:
                if prompt.body == first:
                    assert may_go_on.wait(30)
                return begin(prompt, **more)

            async def collect(messages: Any) -> list[int]:
                return [t async for d in engine.chat(messages, GREEDY) for t in d.token_ids]

            monkeypatch.setattr(processor, "begin", slow)
            held = asyncio.create_task(collect(CONVERSATIONS[1]))
            assert await asyncio.wait_for(collect(CONVERSATIONS[0]), 30) == alone[0]
            assert not held.done()
            may_go_on.set()
            assert await held == alone[1]

    asyncio.run(run())
