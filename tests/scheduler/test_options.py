"""n, priority, timeout_s, cache_salt and a full queue, through Engine, LLM, AsyncLLM and gRPC."""

import asyncio
import contextlib
import gc
import io
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served
from octavo.engine.client.client import Client, ClientDelta, ClientError
from octavo.engine.core.detokenizer import TextStream
from octavo.engine.errors import DuplicateRequest, InputError
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc
from octavo.scheduler.errors import QueueFull, RequestError
from octavo.scheduler.request import RequestStatus

DRAWN: dict[str, Any] = {
    "temperature": 20.0, "top_k": 0, "top_p": 1.0, "seed": 5, "max_tokens": 12, "ignore_eos": True
}  # fmt: skip
SAMPLED = octavo.SamplingParams(**DRAWN)
GREEDY = replace(SAMPLED, temperature=0.0)
LONG = replace(GREEDY, max_tokens=900)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 4,
    "max_queue_len": 2,
}


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8))


def ask(text: str, seed: int | None = None) -> list[dict[str, Any]]:
    parts = [] if seed is None else [{"type": "image", "image": picture(seed)}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[octavo.LLM]:
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        yield llm
        assert not llm.engine.has_requests and not llm.engine.requests._answers
        llm.engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    served = Served(checkpoint, **SETTINGS)
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client
    served.wait_empty()


def of_index(deltas: list[ClientDelta], index: int) -> list[int]:
    return [t for delta in deltas if delta.index == index for t in delta.token_ids]


def test_n_answers_are_those_of_as_many_seeds(llm: octavo.LLM, client: Client) -> None:
    messages = ask("What is it?", 1)
    out = llm.chat(messages, replace(SAMPLED, n=3))[0]
    alone = [llm.chat(messages, replace(SAMPLED, seed=5 + i))[0] for i in range(3)]
    assert [o.token_ids for o in out.outputs] == [a.outputs[0].token_ids for a in alone]
    assert [o.text for o in out.outputs] == [a.outputs[0].text for a in alone]
    assert [(o.index, o.finish_reason) for o in out.outputs] == [(i, "length") for i in range(3)]
    assert len({o.text for o in out.outputs}) == 3
    assert out.usage is not None
    assert (out.usage.prompt_tokens, out.usage.output_tokens) == (len(out.prompt_token_ids), 36)
    deltas = list(client.chat(messages, n=3, **DRAWN))
    assert [of_index(deltas, i) for i in range(3)] == [o.token_ids for o in out.outputs]
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].usage is not None and deltas[-1].usage.output_tokens == 36
    assert [bool(delta.media) for delta in deltas] == [True] + [False] * (len(deltas) - 1)


def test_n_answers_end_each_in_its_own_time(llm: octavo.LLM) -> None:
    messages = ask("Tell me.")
    texts = [o.text for o in llm.chat(messages, replace(SAMPLED, n=4))[0].outputs]
    stop = texts[1][2:5]  # of one answer, and perhaps of others
    out = llm.chat(messages, replace(SAMPLED, n=4, stop=(stop,)))[0]
    assert [o.text for o in out.outputs] == [text.partition(stop)[0] for text in texts]
    expected = ["stop" if stop in text else "length" for text in texts]
    assert [o.finish_reason for o in out.outputs] == expected
    assert "length" in expected  # else they all ended alike


def test_n_works_in_a_batch_and_past_max_num_seqs(llm: octavo.LLM) -> None:
    prompts = [ask("one", 1), ask("two"), ask("three", 3)]
    params = [replace(SAMPLED, n=7), SAMPLED, replace(SAMPLED, n=2)]
    outs = llm.chat(prompts, params)
    assert [len(out.outputs) for out in outs] == [7, 1, 2]
    for prompt, out in zip(prompts, outs, strict=True):
        alone = llm.chat(prompt, SAMPLED)[0].outputs[0]
        assert out.outputs[0].token_ids == alone.token_ids


def test_cached_tokens_are_reported(llm: octavo.LLM, client: Client) -> None:
    messages = ask("How many tokens are there in this long question about a picture?", 7)
    first, second = (llm.chat(messages, GREEDY)[0] for _ in range(2))
    assert first.usage is not None and second.usage is not None
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    size = first.usage.prompt_tokens
    assert first.usage.cached_tokens <= 16 * 2  # at most the template's beginning
    assert second.usage.cached_tokens == min(size // 16 * 16, size - 1)
    for expected in (0, second.usage.cached_tokens):
        salt = "of my own"
        deltas = list(client.chat(messages, temperature=0, max_tokens=2, cache_salt=salt))
        assert deltas[-1].usage is not None and deltas[-1].usage.cached_tokens == expected


def watch_pixels(llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of pixels that each step sends from now on."""
    sent: list[int] = []
    step = llm.engine.group.send

    def watched(batch: Any, step_id: int) -> Any:
        sent.append(sum(task.pixels.nbytes for task in batch.encode))
        return step(batch, step_id)

    monkeypatch.setattr(llm.engine.group, "send", watched)
    return sent


@pytest.mark.lesson("L29")
def test_cache_timing_salts_keep_tenants_apart(
    llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = ask("What is my secret, a long one so that it takes several blocks?", 9)
    cached, answers, pixels = [], set(), []
    sent = watch_pixels(llm, monkeypatch)
    for salt in ("", "a", "b", "a", ""):
        out = llm.chat(messages, GREEDY, cache_salt=salt)[0]
        pixels.append(sum(sent))
        sent.clear()
        assert out.usage is not None
        cached.append(out.usage.cached_tokens > 32)
        answers.add(tuple(out.outputs[0].token_ids))
    assert cached == [False, False, False, True, True]
    whole = 56 * 84 * 3
    assert pixels == [whole, whole, whole, 0, 0]  # nor are embeddings shared
    assert len(answers) == 1


def test_an_image_seen_before_is_neither_sent_nor_encoded(
    llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = watch_pixels(llm, monkeypatch)
    expected = llm.chat(ask("Here it is.", 11), GREEDY)
    assert sum(sent) == 56 * 84 * 3
    sent.clear()
    llm.chat(ask("Once more, with other words before it.", 11), GREEDY)
    # The template's beginning is shared and the image comes right after it, so this is a hit in
    # the prefix cache; moved by a text before it, only the embedding is.
    moved = [*ask("Some text."), *ask("And the image:", 11)]
    out = llm.chat(moved, GREEDY)[0]
    assert out.usage is not None and out.usage.cached_tokens <= 32
    assert sum(sent) == 0
    assert llm.chat(ask("Here it is.", 11), GREEDY)[0].outputs == expected[0].outputs


def test_a_timeout_gives_what_there_is(llm: octavo.LLM) -> None:
    out = llm.chat([ask("Go on."), ask("And on.")], LONG, timeout_s=0.25)
    for each in out:
        assert each.error.startswith("DEADLINE_EXCEEDED: timed out after ")
        assert each.outputs[0].finish_reason == "error"
        assert 0 < len(each.outputs[0].token_ids) < 900
        assert each.usage is not None
        assert each.usage.output_tokens == len(each.outputs[0].token_ids)
    whole = llm.chat(ask("Go on."), LONG)[0].outputs[0]
    found = out[0].outputs[0].token_ids
    assert whole.token_ids[: len(found)] == found


def test_a_timeout_ends_all_answers_each_with_what_it_has(llm: octavo.LLM, served: Served) -> None:
    params = replace(LONG, n=3, temperature=20.0, stop=("\x00" * 99,))
    engine = llm.engine
    engine.add_request("a", ask("Go on."), params, timeout_s=0.25)
    got: list[Any] = []
    while engine.has_requests:
        got += engine.step()
    last = [delta for delta in got if delta.finish_reason]
    assert [(d.index, d.finish_reason) for d in last] == [(i, "error") for i in range(3)]
    assert [delta.usage is not None for delta in last] == [False, False, True]
    assert last[-1].usage.output_tokens == sum(len(delta.token_ids) for delta in got)
    for index in range(3):
        ids = [t for d in got if d.index == index for t in d.token_ids]
        text = "".join(d.text for d in got if d.index == index)
        assert text == engine.processor.tokenizer.backend.decode(ids) and 0 < len(ids) < 900
    with Client(served.address) as client, pytest.raises(ClientError) as caught:
        deltas = []
        asked = {**DRAWN, "max_tokens": 900}
        for delta in client.chat(ask("Go on."), n=3, timeout_s=0.3, **asked):
            deltas.append(delta)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.output_tokens == sum(len(d.token_ids) for d in deltas)


def test_an_error_of_one_answer_ends_all(llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = llm.engine.scheduler
    update = scheduler.update

    def spoiled(result: Any) -> Any:
        rows = scheduler.state.in_flight[0].plan.request_ids
        broken = [name for name in rows if name.endswith("[1]")]
        return update(
            replace(result, errors=dict.fromkeys(broken, RequestError("INTERNAL", "broken")))
        )

    monkeypatch.setattr(scheduler, "update", spoiled)
    out = llm.chat(ask("Hi"), replace(SAMPLED, n=3))[0]
    assert out.error == "INTERNAL: broken"
    assert [o.finish_reason for o in out.outputs] == ["error"] * 3
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    "limit", [{"timeout_s": 0.4}, {"timeout": 0.4}, {"timeout": 30, "timeout_s": 0.4}]
)
def test_a_deadline_over_grpc(served: Served, limit: dict[str, float]) -> None:
    """The field and the call's own deadline: what came before it has come."""
    got: list[int] = []
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 900, "ignore_eos": True}
    with Client(served.address) as client:
        start = time.monotonic()
        with pytest.raises(ClientError) as caught:
            for delta in client.chat(ask("Go on."), **asked, **limit):
                got += delta.token_ids
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert time.monotonic() - start < 10
    assert 0 < len(got) < 900
    served.wait_empty()


def test_a_deadline_that_passes_before_the_input_is_ready(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = served.engine.engine.processor.begin
    free = threading.Event()

    def slow(*args: Any, **more: Any) -> Any:
        free.wait(30)
        return begin(*args, **more)

    monkeypatch.setattr(served.engine.engine.processor, "begin", slow)

    async def collect() -> list[Any]:
        return [delta async for delta in served.engine.chat(ask("Hi"), GREEDY, timeout_s=0.1)]

    for _ in range(2):  # the threads for short texts, which are both busy from now on
        (delta,) = served.run(collect())
        assert delta.error.startswith("DEADLINE_EXCEEDED")
        assert delta.finish_reason == "error" and delta.token_ids == ()
    # A request that has ended keeps no prompt in the queue of these threads.
    prompt = {"prompt": Witness("x" * 1000)}
    gone = weakref.ref(prompt["prompt"])

    async def many() -> None:
        for _ in range(20):
            async for _ in served.engine.generate(prompt, GREEDY, timeout_s=0.001):
                pass

    served.run(many())
    prompt.clear()
    gc.collect()
    assert gone() is None
    free.set()
    served.wait_empty()


class Witness(str):
    """A text that can be referred to weakly."""


def test_an_abort_ends_a_request_whose_input_is_being_made_ready(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(
        served.engine.engine.processor, "begin", lambda *args, **more: free.wait(30)
    )

    async def collect() -> list[Any]:
        stream = served.engine.chat(ask("Hi"), replace(GREEDY, n=3), request_id="a")
        ended = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.1)
        assert await served.engine.abort("a")
        first = await asyncio.wait_for(ended, 5)
        return [first, *[delta async for delta in stream]]

    deltas = served.run(collect())
    free.set()
    assert [(d.index, d.finish_reason) for d in deltas] == [(i, "abort") for i in range(3)]
    assert [d.usage is not None for d in deltas] == [False, False, True]
    served.wait_empty()


def test_the_library_s_timeout_holds_while_input_is_made_ready(
    llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(llm.engine.processor, "begin", lambda *args, **more: free.wait(30))
    out = llm.chat(ask("Hi"), GREEDY, timeout_s=0.1)[0]
    free.set()
    assert out.error == "DEADLINE_EXCEEDED: timed out before the input was preprocessed"


def test_a_timeout_counts_from_the_call(llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What making ready took is gone from it."""
    begin = llm.engine.processor.begin
    monkeypatch.setattr(
        llm.engine.processor, "begin", lambda *args, **more: time.sleep(0.2) or begin(*args, **more)
    )
    seen: list[float] = []
    add = llm.engine.scheduler.add

    def watched(*requests: Any) -> None:
        seen.append(requests[0].deadline - time.monotonic())
        add(*requests)

    monkeypatch.setattr(llm.engine.scheduler, "add", watched)
    llm.chat(ask("Hi"), GREEDY, timeout_s=5.0)
    assert 4.0 < seen[0] <= 4.8


def test_what_is_not_admitted_leaves_nothing_behind(
    llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "octavo.engine.core.active_requests.ActiveRequest.supply", lambda *args, **more: 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            llm.engine.add_request("bad", ask("Hi", 3), GREEDY)
    assert not llm.engine.has_requests and not llm.engine.scheduler.requests
    assert llm.chat(ask("Hi"), GREEDY)[0].error == ""


def test_an_abort_ends_also_what_the_scheduler_has_lost(llm: octavo.LLM) -> None:
    llm.engine.add_request("a", ask("Hi"), replace(GREEDY, n=2))
    llm.engine.scheduler.finish("a", RequestStatus.FINISHED_STOPPED)  # and nobody was told
    assert [delta.finish_reason for delta in llm.engine.abort("a")] == ["abort"] * 2
    assert not llm.engine.has_requests


def test_a_request_that_the_scheduler_has_lost_ends_aloud(llm: octavo.LLM) -> None:
    """And is not stepped for ever."""
    llm.engine.add_request("a", ask("Hi"), replace(GREEDY, n=2))
    for name in ("a", "a[1]"):
        llm.engine.scheduler.finish(name, RequestStatus.FINISHED_STOPPED)  # and nobody was told
    deltas = llm.engine.step()
    assert [delta.finish_reason for delta in deltas] == ["error"] * 2
    assert "INTERNAL" in deltas[0].error
    assert not llm.engine.has_requests


def test_a_request_id_that_is_drawn_is_free(llm: octavo.LLM) -> None:
    ids = [llm.engine.add_request(None, ask("Hi"), GREEDY)]
    number = int(ids[0].removeprefix("request-"))
    ids.append(llm.engine.add_request(f"request-{number + 1}", ask("Hi"), GREEDY))
    ids.append(llm.engine.add_request(None, ask("Hi"), GREEDY))
    assert len(set(ids)) == 3
    for request_id in ids:
        llm.engine.abort(request_id)


def test_params_that_are_none(llm: octavo.LLM) -> None:
    with pytest.raises(InputError, match=r"must be octavo\.SamplingParams, not dict"):
        llm.generate(["Hi", "Ho"], [{"temperature": 0}, None])  # type: ignore[list-item]


def first_of(stream: Any) -> None:
    with contextlib.suppress(ClientError):  # it is aborted
        next(stream, None)


def test_a_full_queue_is_resource_exhausted(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four run, two wait; the seventh is refused, and taken when there is room again."""
    served.wait_empty()
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 900, "ignore_eos": True}
    with Client(served.address) as client:
        streams = [client.chat(ask(f"{i}"), request_id=f"r{i}", **asked) for i in range(6)]
        first = [threading.Thread(target=first_of, args=(stream,)) for stream in streams]
        for thread in first:
            thread.start()
        deadline = time.monotonic() + 10
        while len(served.engine.engine.requests) < 6:  # the step thread has them all
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.setattr(
            served.engine.engine.processor, "begin", lambda *args, **more: 1 / 0
        )  # not reached
        with pytest.raises(ClientError, match="max_queue_len=2; try again later") as caught:
            list(client.chat(ask("more"), **asked))
        monkeypatch.undo()
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        for number in range(6):
            assert client.abort(f"r{number}")
        for thread in first:
            thread.join()
        for stream in streams:
            stream.close()
        served.wait_empty()
        assert list(client.chat(ask("more"), temperature=0, max_tokens=2))


def test_the_library_waits_where_a_server_rejects(llm: octavo.LLM) -> None:
    """More prompts than places: `LLM` feeds them in as there is room."""
    outs = llm.chat([ask(f"Number {i}") for i in range(25)], GREEDY)
    assert [out.error for out in outs] == [""] * 25
    with pytest.raises(QueueFull):
        for number in range(7):
            llm.engine.add_request(f"r{number}", ask("Hi"), GREEDY)
    for number in range(6):
        llm.engine.abort(f"r{number}")


def test_priority_goes_first(llm: octavo.LLM) -> None:
    engine = llm.engine
    for number, priority in enumerate((9, 9, 9, 9, 7, 0)):
        engine.add_request(f"r{number}", ask(f"Number {number}"), GREEDY, priority=priority)
    ended = []
    while engine.has_requests:
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
    assert ended[:1] == ["r5"] and ended.index("r4") < ended.index("r3")


@pytest.mark.lesson("L27")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 0}, "n=0: must be from 1 to 64"),
        ({"n": 65}, "n=65"),
        ({"n": -1}, "n=-1: "),
        ({"n": "3"}, "n='3': "),
        ({"temperature": "x"}, "temperature='x': "),
        ({"prio": 3}, "prio: unknown setting; allowed are .*priority"),
        ({"timeout": "a"}, "timeout='a': must be a number of seconds"),
        ({"n": 2**32 - 1}, "n=4294967295"),
        ({"priority": 10}, "priority=10: must be from 0 to 9"),
        ({"priority": -1}, "priority=-1"),
        ({"timeout_s": -1.0}, "timeout_s=-1.0: must be from 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan: must be a finite number"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt=5"),
    ],
)
def test_unbounded_n(client: Client, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=words.replace("(", r"\(")) as caught:
        list(client.chat(ask("Hi"), **given))
    assert caught.value.code == "INVALID_ARGUMENT"


def test_names_of_answers_are_taken_too(llm: octavo.LLM) -> None:
    engine = llm.engine
    engine.add_request("a", ask("Hi"), replace(GREEDY, n=3))
    for name, params in (("a[2]", GREEDY), ("a", GREEDY)):
        with pytest.raises(DuplicateRequest):
            engine.add_request(name, ask("Hi"), params)
    engine.add_request("b[1]", ask("Hi"), GREEDY)
    with pytest.raises(DuplicateRequest):
        engine.add_request("b", ask("Hi"), replace(GREEDY, n=2))
    engine.step()
    ended = engine.abort("a")
    assert [(d.request_id, d.index, d.finish_reason) for d in ended] == [
        ("a", i, "abort") for i in range(3)
    ]
    assert [delta.usage is not None for delta in ended] == [False, False, True]
    assert len(engine.abort("b[1]")) == 1


@pytest.mark.lesson("L16")
def test_client_assert_text_that_cannot_be_made_ends_its_request_alone(
    llm: octavo.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, bad = TextStream.push, []

    def failing(self: TextStream, token_ids: Any) -> str:
        if not bad:
            bad.append(self)
        if self is bad[0]:
            raise RuntimeError("a tokenizer's fault")
        return push(self, token_ids)

    expected = llm.chat(ask("good"), GREEDY)[0].outputs
    monkeypatch.setattr(TextStream, "push", failing)
    broken, good = llm.chat([ask("bad"), ask("good")], GREEDY)
    assert broken.error == "INTERNAL: detokenization failed; see the server's log"
    assert good.error == "" and good.outputs == expected


def test_prompts_over_grpc_carry_their_options(served: Served) -> None:
    """The fields as other clients send them: an absent priority is 5, and 0 is 0."""
    seen: list[Any] = []
    add = served.engine._steps.add

    def watched(request_id: str, prompt: Any, params: Any, clock: Any) -> None:
        seen.append(clock.left)
        add(request_id, prompt, params, clock)

    served.engine._steps.add = watched  # type: ignore[method-assign]
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    with grpc.insecure_channel(served.address) as channel:
        stub = octavo_pb2_grpc.InferenceStub(channel)
        for more in ({}, {"priority": 0, "timeout_s": 20.0, "cache_salt": "s"}):
            request = pb.GenerateRequest(text="Hi", **more)
            request.sampling.max_tokens = 1
            assert list(stub.Generate(request))
    served.engine._steps.add = add  # type: ignore[method-assign]
    assert (seen[0].priority, seen[0].timeout_s, seen[0].cache_salt) == (5, None, "")
    assert (seen[1].priority, seen[1].cache_salt) == (0, "s")
    assert 19 < seen[1].timeout_s <= 20


def test_options_that_are_none_of_a_request(llm: octavo.LLM) -> None:
    with pytest.raises(
        TypeError, match="n: unknown option; options are priority, timeout_s, cache"
    ):
        llm.chat(ask("Hi"), GREEDY, n=3)  # type: ignore[call-arg]
    assert llm.chat(ask("Hi"), GREEDY, priority=None, cache_salt=None)  # type: ignore[arg-type]


def test_a_failure_s_text_says_its_code_once(served: Served) -> None:
    with Client(served.address) as client, pytest.raises(ClientError) as caught:
        list(client.chat(ask("Hi"), timeout_s=0))
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert caught.value.text.startswith("timed out ")
