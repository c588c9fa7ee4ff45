"""Two replicas on a Ray of this machine: both of Serve's served, where requests go, and one replica
killed while it answers."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import httpx2
import numpy as np
import openai
import psutil
import pytest
import ray
from ray import serve

import octavo
from octavo.benchmarks.demo_model.draw import draw_shape
from octavo.engine.client.errors import ClientError
from octavo.engine.input.parsed_prompt import ParsedPrompt
from octavo.engine.replicas.held import links_in
from octavo.engine.replicas.prefix import prefix_of
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

MODEL = "octavo-embedded"
WHO = [{"role": "user", "content": "Who are you?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 32 << 20,
    "max_num_seqs": 8,
}
REPLICA = "ray::ServeReplica:default:EngineReplica"
SERVICERS = [
    f"octavo.proto.octavo_pb2_grpc.add_{name}Servicer_to_server"
    for name in ("Inference", "Control")
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.1)


@dataclass
class Cluster:
    http: str
    grpc: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.http}/v1", api_key="-", max_retries=0)

    @property
    def replicas(self) -> dict[int, psutil.Process]:
        """The processes of the replicas, by pid."""
        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(REPLICA):
                    found[process.pid] = process
            except psutil.Error:
                continue
        return found

    @property
    def num_running(self) -> int:
        deployment = serve.status().applications["default"].deployments["EngineReplica"]
        return deployment.replica_states.get("RUNNING", 0)


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Cluster]:
    from octavo.engine.replicas import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",  # not one that runs on this machine
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=100 << 20,
            _node_ip_address="127.0.0.1",
        )
        http, rpc = free_port(), free_port()
        serve.start(
            http_options={"host": "127.0.0.1", "port": http},
            grpc_options={"port": rpc, "grpc_servicer_functions": SERVICERS},
        )
        try:
            serve.run(app({**SETTINGS, **settings}))
            yield Cluster(f"http://127.0.0.1:{http}", f"127.0.0.1:{rpc}")
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running(min_replicas=2, max_replicas=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected() -> str:
    """What an engine of its own answers."""
    with octavo.LLM(**SETTINGS) as llm:
        return llm.chat(WHO, octavo.SamplingParams(**GREEDY))[0].outputs[0].text


def picture(seed: int) -> str:
    buffer = io.BytesIO()
    drawn = draw_shape(np.random.default_rng(seed), (224, 224), "purple", "star")
    drawn.image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def cached_of(client: openai.OpenAI, messages: Any) -> int:
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=4
    )
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_both_servers_answer_as_an_engine_does(cluster: Cluster, expected: str) -> None:
    client = cluster.client()
    whole = client.chat.completions.create(model=MODEL, messages=WHO, **GREEDY)
    chunks = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model=MODEL, messages=WHO, stream=True, **GREEDY
        )
    ]
    with octavo.Client(cluster.grpc) as grpc_client:
        deltas = [delta.text for delta in grpc_client.chat(WHO, **GREEDY)]
    assert whole.choices[0].message.content == "".join(chunks) == "".join(deltas) == expected
    assert len(chunks) > 4 and len(deltas) > 4  # they came one by one


def test_what_is_rejected_is_reported_as_octavo_serve_tells_it(cluster: Cluster) -> None:
    with pytest.raises(openai.NotFoundError, match="model='nope'"):
        cluster.client().chat.completions.create(model="nope", messages=WHO)
    assert httpx2.post(f"{cluster.http}/v1/completions", content=b"{}").status_code == 415
    assert httpx2.get(f"{cluster.http}/v1/models").json()["data"][0]["id"] == MODEL
    foreign = httpx2.get(f"{cluster.http}/v1/models", headers={"host": "evil.example"})
    assert foreign.status_code == 421  # DNS rebinding: there are no keys
    assert httpx2.get(f"{cluster.http}/ready").json() == {"status": "ready"}
    with octavo.Client(cluster.grpc) as client, pytest.raises(ClientError) as caught:
        list(client.chat(WHO, temperature=-1))
    assert caught.value.code == "INVALID_ARGUMENT"
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = octavo_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=-1))
        for call in (lambda: list(stub.Generate(request)), lambda: stub.GenerateOnce(request)):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "temperature=-1" in error.value.details()
            assert "grpc-status-details-bin" in dict(error.value.trailing_metadata())
        with pytest.raises(grpc.RpcError) as error:
            stub.Abort(pb.AbortRequest(request_id="a"))
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert stub.Tokenize(pb.TokenizeRequest(text="Who?")).ids
        info = octavo_pb2_grpc.ControlStub(channel).GetModelInfo(pb.GetModelInfoRequest())
        assert info.name == MODEL


def test_requests_go_where_their_prefix_is(cluster: Cluster) -> None:
    """By chance alone, each second request would find its prefix every other time."""
    client = cluster.client()
    for number in range(8):
        system = f"Rule {number}: " + "answer in one word. " * 12
        asked = [
            [{"role": "system", "content": system}, {"role": "user", "content": question}]
            for question in ("Who are you?", "What is your name?")
        ]
        assert cached_of(client, asked[0]) < 32  # the template's beginning at most
        assert cached_of(client, asked[1]) >= 64


def test_requests_go_where_their_picture_is_by_either_server(cluster: Cluster) -> None:
    client = cluster.client()
    with octavo.Client(cluster.grpc) as grpc_client:
        for seed in range(6):
            uri = picture(seed)
            part = {"type": "image_url", "image_url": {"url": uri}}
            first = [{"role": "user", "content": [part, {"type": "text", "text": "What color?"}]}]
            again = [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": uri},
                        {"type": "text", "text": "Shape?"},
                    ],
                }
            ]
            assert cached_of(client, first) < 32
            *_, last = grpc_client.chat(again, temperature=0, max_tokens=4)
            assert last.usage is not None and last.usage.cached_tokens >= 48


def test_a_client_that_goes_away_frees_its_request(cluster: Cluster) -> None:
    client = cluster.client()
    body: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": 3900,
        "extra_body": {"ignore_eos": True},
    }
    name = "goes-away"
    streams = [
        client.chat.completions.create(
            model=MODEL, messages=WHO, stream=True, extra_headers={"x-request-id": name}, **body
        )
    ]
    next(iter(streams[0]))
    streams[0].close()
    with octavo.Client(cluster.grpc) as grpc_client:
        stream = grpc_client.chat(WHO, temperature=0, max_tokens=3900, ignore_eos=True)
        next(stream)
        stream.close()
    wait_for(lambda: aborted(cluster) >= 2)


def aborted(cluster: Cluster) -> int:
    """Of both replicas: each answers some of so many questions."""
    found: dict[str, int] = {}
    for _ in range(12):
        text = httpx2.get(f"{cluster.http}/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        memory = lines['octavo_worker_resident_memory_bytes{rank="0"}']
        found[memory] = int(float(lines.get('octavo_requests_total{finish_reason="abort"}', "0")))
    return sum(found.values())


def test_reports_name_what_is_held(cluster: Cluster) -> None:
    """Serve asks each replica every second, and hands what it says to every router."""
    client = cluster.client()
    system = "This one is reported. " * 30
    cached_of(client, [{"role": "system", "content": system}, *WHO])
    digest = prefix_of(ParsedPrompt.of([{"role": "system", "content": system}])).links[-1].hash
    assert len(digest) == 8
    text = "Of several prompts this is the first. " * 30
    client.completions.create(model=MODEL, prompt=[text, "Another."], max_tokens=2)
    handle = serve.get_deployment_handle("EngineReplica", "default")
    reports = [handle.record_routing_stats.remote().result(timeout_s=20) for _ in range(8)]
    held = frozenset[bytes]().union(*(links_in(report["links"]) for report in reports))
    assert digest in held
    assert prefix_of(ParsedPrompt(text)).links[-2].hash in held


@dataclass
class Outcome:
    text: str
    error: str = ""


def long_answer(cluster: Cluster, number: int, begun: list[int]) -> Outcome:
    """One that is streamed for long; what came of it."""
    messages = [{"role": "user", "content": f"Question {number}: who are you? " * 4}]
    outcome = Outcome("")
    try:
        for chunk in cluster.client().chat.completions.create(
            model=MODEL,
            messages=messages,  # type: ignore[arg-type]
            stream=True,
            temperature=0,
            max_tokens=500,
            extra_body={"ignore_eos": True},
        ):
            if not outcome.text and chunk.choices[0].delta.content:
                begun.append(number)
            outcome.text += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        outcome.error = json.dumps(error.body)
    return outcome


def test_one_replica_is_killed_under_load(cluster: Cluster, expected: str) -> None:
    before = cluster.replicas
    assert len(before) == 2
    begun: list[int] = []
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(long_answer, cluster, number, begun) for number in range(8)]
        wait_for(lambda: len(begun) == 8)
        victim = next(iter(before.values()))
        workers = victim.children(recursive=True)
        os.kill(victim.pid, signal.SIGKILL)
        later = [
            pool.submit(
                cluster.client().chat.completions.create, model=MODEL, messages=WHO, **GREEDY
            )
            for _ in range(8)
        ]
        outcomes = [each.result(120) for each in running]
        answers = [each.result(120).choices[0].message.content for each in later]
    lost = [each for each in outcomes if each.error]
    assert 0 < len(lost) < 8  # those of the one replica, and no others
    for each in lost:
        assert "the replica was lost; retry" in each.error
        assert '"code": "unavailable"' in each.error
        assert each.text
    assert answers == [expected] * 8
    assert not [each for each in workers if each.is_running()]  # nothing of it is left
    wait_for(lambda: cluster.num_running == 2 and len(cluster.replicas) == 2)
    after = cluster.replicas
    assert victim.pid not in after and len(before.keys() & after.keys()) == 1
    client = cluster.client()
    for number in range(8):  # new prompts: either replica takes some
        messages = [{"role": "user", "content": f"{number}: {'who are you? ' * 8}"}]
        assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)


@pytest.mark.slow
def test_replicas_come_with_the_load() -> None:
    """Not beside `cluster`: a process has one Ray. Serve waits half a minute to be sure."""
    if ray.is_initialized():
        pytest.skip("run alone: pytest -m slow tests/replicas/test_replicas.py")
    with running(min_replicas=1, max_replicas=2, target_ongoing_requests=1) as cluster:
        assert cluster.num_running == 1
        stop = threading.Event()

        def ask() -> None:
            with cluster.client() as client:
                while not stop.is_set():
                    client.chat.completions.create(
                        model=MODEL,
                        messages=WHO,  # type: ignore[arg-type]
                        max_tokens=100,
                        extra_body={"ignore_eos": True},
                    )

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            try:
                wait_for(lambda: cluster.num_running == 2, 150)
            finally:
                stop.set()
            for each in asking:
                each.result(60)
