"""What the engine tells of itself at one moment, and to whom; and the files of the page."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from octavo.benchmarks.fakes.tiny_server import Served, wait_for
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.errors import EngineDead
from octavo.engine.observability.snapshot import (
    CACHED,
    FIRST_REQUEST,
    SHARED,
    UNUSED,
    take_snapshot,
)
from octavo.engine.observability.stats import MAX_STEPS, EngineStats
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.http_api import page_route, snapshot_route
from octavo.engine.server.http_api.server import HttpServer
from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.params import SamplingParams
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.step import StepResult

KEY = "the-key-of-this-server"
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)


# Alone


def make_scheduler(num_blocks: int, max_num_seqs: int = 8) -> tuple[Scheduler, EngineStats]:
    config = SchedulerConfig(num_blocks, 16, max_num_seqs, 512, 512, 64, 64)
    scheduler = Scheduler(config)
    return scheduler, EngineStats(scheduler, None)  # type: ignore[arg-type]


def add(scheduler: Scheduler, name: str, token_ids: list[int]) -> None:
    params = SamplingParams(max_tokens=4, temperature=0)
    scheduler.add(Request(f"{name}#0", array("i", token_ids), params))


def step(scheduler: Scheduler, stats: EngineStats) -> None:
    plan = scheduler.schedule()
    assert plan is not None
    stats.plan(plan, 0.0)
    stats.done(0.25)
    scheduler.update(StepResult(plan.step_id, tuple(7 for samples in plan.samples if samples)))


def expand(runs: list[int]) -> list[int]:
    return [code for i in range(0, len(runs), 2) for code in [runs[i]] * runs[i + 1]]


def test_every_block_is_reported_of() -> None:
    """Against what the scheduler itself says: alone, shared, kept for a prefix, and unused."""
    scheduler, stats = make_scheduler(20, max_num_seqs=3)
    add(scheduler, "gone", list(range(100, 140)))
    step(scheduler, stats)
    scheduler.finish("gone#0", RequestStatus.FINISHED_ABORTED)
    add(scheduler, "one", list(range(70)))
    step(scheduler, stats)
    add(scheduler, "other", [*range(64), 1, 2, 3])
    step(scheduler, stats)
    for name in ("waits", "waits too"):
        add(scheduler, name, [9] * 20)
    step(scheduler, stats)
    snapshot = take_snapshot(scheduler, stats)
    names = [row.request_id for row in snapshot.requests]
    assert names == ["one#0", "other#0", "waits#0", "waits too#0"]
    assert [row.status for row in snapshot.requests] == ["running"] * 3 + ["waiting"]
    one, other, waits, _ = snapshot.requests
    assert (one.num_prompt_tokens, one.num_computed_tokens, one.num_output_tokens) == (70, 72, 3)
    assert (other.num_cached_tokens, other.num_blocks, other.max_tokens) == (64, 5, 4)
    codes = expand(snapshot.runs())
    assert len(codes) == 20
    tables = [request.block_table for request in scheduler.running]
    for block, code in enumerate(codes):
        owners = [index for index, table in enumerate(tables) if block in table]
        if len(owners) == 1:
            assert code == FIRST_REQUEST + owners[0]
        else:
            assert code == (SHARED if owners else CACHED if block in snapshot.evictable else UNUSED)
    assert codes.count(SHARED) == 4 and codes.count(CACHED) == 2  # two of "gone" were full
    assert codes.count(UNUSED) == 20 - len({b for table in tables for b in table}) - 2
    assert waits.num_blocks == 2


def test_it_is_a_copy() -> None:
    scheduler, stats = make_scheduler(8)
    add(scheduler, "one", list(range(20)))
    step(scheduler, stats)
    snapshot = take_snapshot(scheduler, stats)
    before = snapshot.runs()
    scheduler.finish("one#0", RequestStatus.FINISHED_ABORTED)
    assert snapshot.runs() == before != take_snapshot(scheduler, stats).runs()
    assert take_snapshot(scheduler, stats).requests == ()


def test_steps_are_reported_one_by_one_and_not_for_ever() -> None:
    scheduler, stats = make_scheduler(8)
    for number in range(MAX_STEPS + 3):
        add(scheduler, str(number), list(range(20)))
        step(scheduler, stats)
        scheduler.finish(f"{number}#0", RequestStatus.FINISHED_ABORTED)
    steps = take_snapshot(scheduler, stats).steps
    assert len(steps) == MAX_STEPS and steps[-1].step_id == MAX_STEPS + 3
    assert (steps[-1].num_encode_tokens, steps[-1].num_prefill_tokens) == (0, 4)  # 16 were cached
    assert steps[0].step_id == 4


# Over HTTP


class TwoServers(Served):
    async def _start(self) -> None:
        await super()._start()
        self.others: list[str] = []
        self.locked = HttpServer("127.0.0.1", 0, ApiKeys([KEY]))
        self.url = f"http://{await self.locked.start(self.engine, CallTracker())}"
        self.open = HttpServer("127.0.0.1", 0)
        self.open_url = f"http://{await self.open.start(self.engine, CallTracker())}"

    def close(self) -> None:
        self.run(self.locked.drain(1.0))
        self.run(self.open.drain(1.0))
        super().close()


@pytest.fixture(scope="module")
def served() -> Iterator[TwoServers]:
    settings: dict[str, Any] = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 << 20}
    served = TwoServers(EMBEDDED_MODEL, dtype="float32", max_num_seqs=4, **settings)
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture(autouse=True)
def none_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        for name in served.others:
            served.run(served.engine.abort(name))
        served.others.clear()
        served.wait_empty()


@pytest.fixture
def client(served: TwoServers) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=served.url, headers=headers, timeout=30) as client:
        yield client


def begin(served: TwoServers, name: str, params: SamplingParams) -> None:
    async def read() -> None:
        async for _ in served.engine.generate({"prompt": "Who? " * 9}, params, request_id=name):
            pass

    served.others.append(name)
    asyncio.run_coroutine_threadsafe(read(), served.loop)


def test_it_tells_of_requests_blocks_and_steps(served: TwoServers, client: httpx2.Client) -> None:
    begin(served, "mine#[7]", SamplingParams(temperature=0, max_tokens=900, ignore_eos=True, n=2))
    wait_for(lambda: len(client.get("/engine/snapshot").json()["requests"]) == 2)
    wait_for(lambda: client.get("/engine/snapshot").json()["requests"][1]["num_output_tokens"] > 2)
    found = client.get("/engine/snapshot").json()
    assert found["names_are_shown"] is True
    names = [(row["name"], row["answer"]) for row in found["requests"]]
    assert names == [("mine#[7]", 0), ("mine#[7]", 1)]
    codes = expand(found["blocks"])
    assert len(codes) == found["load"]["num_blocks"] == served.engine.engine.num_blocks
    assert codes.count(SHARED) > 0  # of the prompt
    used = len(codes) - codes.count(UNUSED) - codes.count(CACHED)
    assert used == found["load"]["num_blocks"] - found["load"]["num_free_blocks"]
    prefill = [step for step in found["steps"] if step[3]]
    decode = [step for step in found["steps"] if step[4] == 2]
    assert prefill and decode and all(step[2] == 0 for step in found["steps"])
    # A late thread may receive two results at once: the second step then has taken no time.
    assert min(step[1] for step in found["steps"]) >= 0 < max(step[1] for step in found["steps"])
    last = found["steps"][-1][0]
    later = client.get("/engine/snapshot", params={"after": last}).json()["steps"]
    assert all(step[0] > last for step in later)
    served.run(served.engine.abort("mine#[7]"))
    served.wait_empty()
    wait_for(lambda: client.get("/engine/snapshot").json()["requests"] == [])


def test_it_is_for_who_may(served: TwoServers, client: httpx2.Client) -> None:
    refused = httpx2.get(f"{served.url}/engine/snapshot")
    assert refused.status_code == 401 and "requests" not in refused.text
    for wrong in ("-1", "x", "1.5", "", "9" * 30, "²"):
        answer = client.get("/engine/snapshot", params={"after": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "after", wrong
    assert client.post("/engine/snapshot", json={}).status_code == 405


@pytest.mark.parametrize(
    ("host", "is_known", "is_named"),
    [
        ("127.0.0.1", False, True),
        ("::1", False, True),
        ("::ffff:127.0.0.1", False, True),
        ("192.0.2.1", False, False),
        ("::ffff:192.0.2.1", False, False),
        ("2001:db8::1", False, False),
        ("", False, False),
        ("192.0.2.1", True, True),
    ],
)
def test_names_are_for_who_may_drain(
    served: TwoServers, host: str, is_known: bool, is_named: bool
) -> None:
    """As `Control.Drain`: a key or a certificate, else this machine. Others see a number."""
    begin(served, "a-name-to-abort-by", LONG)
    view = snapshot_route.LiveView(served.engine, is_known)
    asked: Any = SimpleNamespace(query_params={}, client=SimpleNamespace(host=host))

    def look() -> str:
        return served.run(view.snapshot(asked)).body.decode()

    wait_for(lambda: '"number":' in look())
    assert ("a-name-to-abort-by" in look()) == is_named
    assert (f'"names_are_shown":{str(is_named).lower()}') in look()


def test_many_who_look_cost_no_more_than_one(
    served: TwoServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = snapshot_route.LiveView(served.engine, True)
    asked: Any = SimpleNamespace(query_params={}, client=None)
    taken: list[object] = []
    whole = served.engine.snapshot

    async def count() -> Any:
        taken.append(None)
        return await whole()

    monkeypatch.setattr(served.engine, "snapshot", count)
    monkeypatch.setattr(snapshot_route, "MIN_AGE", 3600.0)

    async def crowd() -> None:
        await asyncio.gather(*(view.snapshot(asked) for _ in range(50)))

    served.run(crowd())
    assert len(taken) == 1
    monkeypatch.setattr(snapshot_route, "MIN_AGE", 0.0)
    served.run(view.snapshot(asked))
    assert len(taken) == 2


def test_a_fault_is_reported_to_who_looks_alone(
    served: TwoServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(served, "goes-on", LONG)
    wait_for(lambda: served.engine.engine.has_requests)
    monkeypatch.setattr(snapshot_route, "MIN_AGE", 0.0)
    monkeypatch.setattr(served.engine.engine.stats, "load", None)
    answer = httpx2.get(f"{served.open_url}/engine/snapshot")  # whose connection ends with it
    assert answer.status_code == 500 and "NoneType" not in answer.text
    monkeypatch.undo()
    assert httpx2.get(f"{served.open_url}/engine/snapshot").json()["requests"]
    assert served.engine.engine.has_requests and not served.engine.failed


def test_an_engine_that_has_stopped_says_so(
    served: TwoServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.engine.engine, "failed", "a test")
    with pytest.raises(EngineDead, match="a test"):
        served.run(served.engine.snapshot())


# The page's files


def test_the_page_needs_no_key_and_its_data_do(served: TwoServers) -> None:
    for path, name in page_route.PATHS.items():
        answer = httpx2.get(served.url + path)
        assert answer.status_code == 200, path
        assert answer.content == (page_route.FOLDER / name).read_bytes()
        assert answer.headers["content-type"] == page_route.TYPES["." + name.rpartition(".")[2]]
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    for path in (
        "/page/",
        "/page/../page_route.py",
        "/page/%2e%2e/page_route.py",
        "/page/x.js",
        "//",
    ):
        assert httpx2.get(served.url + path).status_code in (401, 404), path
    assert httpx2.get(served.url + "/v1/models").status_code == 401
    assert httpx2.post(served.url + "/", json={}).status_code == 405


def test_the_page_is_whole_and_needs_no_other() -> None:
    """All its files are served; none names another place, nor has a script or a style inside."""
    files = {path.name: path.read_text() for path in page_route.FOLDER.iterdir()}
    assert set(files) == set(page_route.PATHS.values())
    for name, text in files.items():
        places = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", text))
        assert places <= {"http://www.w3.org"}, name  # SVG's own name
        assert text.count("\n") <= 300, name
        named = re.findall(r"(?:src|href|from|import) ?=? ?\(?\"(/[^\"]*)\"", text)
        assert all(path in page_route.PATHS for path in named), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    page = files["index.html"]
    assert not re.search(r"<style|style=|\son[a-z]+=|<script(?![^>]*src=)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    scripts = "".join(text for name, text in files.items() if name.endswith(".js"))
    used = re.findall(r'(?:getElementById|\$)\("([^"]+)"\)', scripts)
    assert used and set(used) <= set(ids)
