"""Where a request goes: what its prefix is called, what a replica says it holds, what is made of
both. No cluster is started."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from octavo.benchmarks.fakes.simulated_worker import Simulation, make_config, make_request
from octavo.engine.errors import ConfigError
from octavo.engine.input.parsed_prompt import ParsedPrompt
from octavo.engine.replicas import read
from octavo.engine.replicas import router as router_module
from octavo.engine.replicas.calls import Call
from octavo.engine.replicas.held import Held, links_in
from octavo.engine.replicas.prefix import MAX_LINKS, PIECE, Prefix
from octavo.engine.replicas.prefix import prefix_of as prefix_of_parsed
from octavo.engine.replicas.read import grpc_prefix, http_prefix
from octavo.engine.replicas.router import PrefixRouter
from octavo.engine.replicas.settings import read_settings
from octavo.engine.server.metadata import request_name
from octavo.proto import octavo_pb2 as pb
from octavo.scheduler.request import Request

LONG = "You are a patient helper who answers in one word. " * 12  # 600 characters
PICTURE = {"type": "image", "image": "data:image/png;base64,AAAA"}


def prefix_of(prompt: Any, cache_salt: str = "") -> Prefix:
    return prefix_of_parsed(ParsedPrompt.of(prompt), cache_salt)


def chat(*content: Any, system: str = LONG) -> dict[str, Any]:
    return {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}]
    }


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def num_shared(one: Prefix, other: Prefix) -> int:
    """Links of the longest prefix that both have."""
    pairs = zip(one.links, other.links, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a.hash != b.hash), len(one.links))


# The prefix


def test_links_chain_what_comes_before_them() -> None:
    first = prefix_of(chat(PICTURE, text("What is it?")))
    second = prefix_of(chat(PICTURE, text("How many?")))
    other = prefix_of(chat(PICTURE, text("What is it?"), system=f"!{LONG}"))
    assert [link.text_end for link in first.links] == [256, 512, 600, 600, 611]
    assert [link.media_end for link in first.links] == [0, 0, 0, 1, 1]
    assert num_shared(first, second) == 4  # the system prompt and the picture
    assert num_shared(first, other) == 0
    assert first.media == second.media == other.media
    assert first.num_characters == 611


def test_roles_options_kinds_and_salts_make_other_prefixes() -> None:
    base = prefix_of(chat(PICTURE))
    smaller = prefix_of(chat({**PICTURE, "max_pixels": 3136}))
    video = prefix_of(chat({"type": "video", "video": PICTURE["image"]}))
    assert len({base.media, smaller.media, video.media}) == 3
    assert num_shared(base, prefix_of(chat(PICTURE), cache_salt="a")) == 0
    user = {"messages": [{"role": "user", "content": LONG}]}
    system = {"messages": [{"role": "system", "content": LONG}]}
    assert num_shared(prefix_of(user), prefix_of(system)) == 0


def test_every_kind_of_source_has_a_digest_of_its_content() -> None:
    square, wide = np.zeros((4, 4, 3), np.uint8), np.zeros((2, 8, 3), np.uint8)
    sources: list[Any] = [b"a", "a", square, wide, [b"a"], ["a", "a"], [["a"], "a"], None, 7]
    digests = [prefix_of(chat({"type": "image", "image": each})).media[0] for each in sources]
    assert len(set(digests)) == len(sources)


def test_a_long_prompt_has_bounded_links() -> None:
    prefix = prefix_of({"prompt": "x" * (PIECE * (MAX_LINKS + 100))})
    assert len(prefix.links) == MAX_LINKS


def test_token_ids_are_a_prefix_too() -> None:
    one = prefix_of({"prompt_token_ids": list(range(500))})
    other = prefix_of({"prompt_token_ids": [*range(499), 7]})
    assert num_shared(one, other) == len(one.links) - 1


def test_both_servers_name_a_chat_alike() -> None:
    uri = PICTURE["image"]
    content = [{"type": "image_url", "image_url": {"url": uri}}, text("Hm?")]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    by_http = asyncio.run(http_prefix("/v1/chat/completions", body))
    parts = [
        pb.ContentPart(media=pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE, url=uri)),
        pb.ContentPart(text="Hm?"),
    ]
    message = pb.Message(role="user", content=parts)
    request = pb.GenerateRequest(conversation=pb.Conversation(messages=[message]))
    assert by_http.links
    assert grpc_prefix(request) == by_http


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"messages": 7}', b'{"messages": [[]]}', b"\xff", b'{"prompt": 1}'],
)
def test_what_cannot_be_read_has_no_prefix(body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/nowhere"):
        assert asyncio.run(http_prefix(path, body)) == Prefix()


def test_what_nests_too_deep_to_be_hashed_has_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on JSON may nest deeper than Python calls; the replica refuses it."""
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    part = {"type": "image_url", "image_url": {"url": "data:,", "max_pixels": deep}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    monkeypatch.setattr(read, "read_json", lambda data: body)
    assert asyncio.run(http_prefix("/v1/chat/completions", b"{}")) == Prefix()
    assert grpc_prefix(pb.GenerateRequest()) == Prefix()


# What a replica holds


def held_after(request: Request, prefix: Prefix, **settings: int) -> tuple[Held, Simulation]:
    simulation = Simulation(make_config(**settings))
    held = Held(simulation.scheduler, simulation.scheduler.config.block_size)
    call = held.expect(request.request_id, prefix)
    simulation.scheduler.add(request)
    held.admitted(request.request_id, request)
    simulation.run()
    held.answered(call)
    held.forget(call)
    return held, simulation


def test_what_is_reported_is_what_the_block_manager_and_the_encoder_cache_have() -> None:
    prefix = prefix_of(chat(PICTURE, text("What is it?")))
    request = make_request("a", 40, (20, 8, b"cat" * 11))
    held, simulation = held_after(request, prefix)
    report = held.report()
    assert set(report) == {"links", "media"}
    assert links_in(report["links"]) == {link.hash for link in prefix.links}
    assert report["media"] == {prefix.media[0]: 8}
    simulation.scheduler.blocks.reset()
    assert held.report() == {"links": b"", "media": {prefix.media[0]: 8}}
    simulation.scheduler.encoder_cache.reset()
    assert held.report() == {"links": b"", "media": {}}


def test_blocks_that_are_evicted_are_no_longer_reported() -> None:
    """The blocks at a prompt's end go first, and so do the links that stand for them."""
    prefix = prefix_of({"prompt": LONG})
    held, simulation = held_after(make_request("a", 40), prefix, num_blocks=16)
    assert len(held.report()["links"]) == 3 * 8
    simulation.scheduler.add(make_request("b", 36, seed=9))
    simulation.run()
    left = links_in(held.report()["links"])
    assert left < {link.hash for link in prefix.links}
    assert prefix.links[-1].hash not in left


def test_a_link_before_the_first_full_block_is_not_held() -> None:
    parts = [{"type": "text", "text": each} for each in ("a", LONG)]
    prefix = prefix_of([{"role": "user", "content": parts}])
    held, _ = held_after(make_request("a", 40), prefix)
    assert prefix.links[0].hash not in links_in(held.report()["links"])
    assert prefix.links[-1].hash in links_in(held.report()["links"])


def test_requests_that_never_answer_leave_nothing() -> None:
    simulation = Simulation(make_config())
    held = Held(simulation.scheduler, 4)
    call = held.expect("a", prefix_of({"prompt": LONG}))
    held.forget(call)
    held.admitted("a", make_request("a", 4))  # refused, and its name used again by another
    held.answered(call)
    assert held.report() == {"links": b"", "media": {}}


@pytest.mark.parametrize("comes", ["before the first is admitted", "after it"])
def test_a_rejected_duplicate_takes_nothing_from_the_first(comes: str) -> None:
    simulation = Simulation(make_config())
    held = Held(simulation.scheduler, simulation.scheduler.config.block_size)
    prefix, request = prefix_of({"prompt": LONG}), make_request("a", 40)
    first = held.expect("a", prefix)
    simulation.scheduler.add(request)
    if comes == "after it":
        held.admitted("a", request)
    duplicate = held.expect("a", prefix_of({"prompt": f"!{LONG}"}))
    held.answered(duplicate)  # that it is refused
    held.forget(duplicate)
    if comes != "after it":
        held.admitted("a", request)
    simulation.run()
    held.answered(first)
    held.forget(first)
    assert links_in(held.report()["links"]) == {link.hash for link in prefix.links}


def test_of_several_prompts_the_first_is_learned() -> None:
    """The engine knows the prompts of a call NAME as NAME-RANDOM-0, NAME-RANDOM-1, ..."""
    simulation = Simulation(make_config())
    held = Held(simulation.scheduler, simulation.scheduler.config.block_size)
    prefix = prefix_of({"prompt": LONG})
    call = held.expect("a", prefix)
    name = request_name("a", lambda name: False, num_prompts=2)
    for request in (make_request(f"{name}-1", 36, seed=9), make_request(f"{name}-0", 40)):
        simulation.scheduler.add(request)
        held.admitted(request.request_id, request)
    simulation.run()
    held.answered(call)
    assert links_in(held.report()["links"]) == {link.hash for link in prefix.links}


# The router


class Replica:
    """As much of Serve's `RunningReplica` as the router looks at."""

    def __init__(
        self, name: str, links: bytes = b"", media: dict[bytes, int] | None = None
    ) -> None:
        self.replica_id = name
        self.routing_stats: dict[str, Any] = {}
        if links or media:
            self.routing_stats = {"links": links, "media": media or {}}


def make_router(queue_lens: dict[str, int], max_imbalance: int = 8) -> PrefixRouter:
    """Its queue lengths are given: Serve's part of it is not there."""
    made = PrefixRouter.__new__(PrefixRouter)
    made._replica_queue_len_cache = queue_lens  # type: ignore[assignment]
    made.initialize_state(max_imbalance=max_imbalance)
    return made


def pending(prefix: Prefix) -> Any:
    context = SimpleNamespace(should_backoff=False)
    return SimpleNamespace(args=[Call("a", prefix)], routing_context=context)


def choose(router: PrefixRouter, replicas: list[Replica], prefix: Prefix) -> list[list[Replica]]:
    asked = pending(prefix)
    found = asyncio.run(router.choose_replicas(replicas, asked))  # type: ignore[arg-type]
    assert asked.routing_context.should_backoff  # else Serve asks again without a pause
    return found  # type: ignore[return-value]


def links_of(prefix: Prefix, count: int) -> bytes:
    return b"".join(link.hash for link in prefix.links[:count])


def test_a_request_goes_where_most_of_its_prefix_is() -> None:
    prefix = prefix_of(chat(text("What is it?")))
    replicas = [
        Replica("none"),
        Replica("half", links_of(prefix, 1)),
        Replica("most", links_of(prefix, 3)),
    ]
    found = choose(make_router({}), replicas, prefix)
    assert [each.replica_id for each in found[0]] == ["most"]
    assert len(found[1]) == 2  # where to, if that one has no room
    assert len(choose(make_router({}), replicas, Prefix())) == 1
    assert len(choose(make_router({}), replicas, prefix_of(chat(text("?"), system="Hi")))) == 1


def test_a_request_goes_where_its_picture_is_encoded() -> None:
    prefix = prefix_of(chat(PICTURE, system="Hello"))
    replicas = [Replica("none"), Replica("it", media={prefix.media[0]: 64})]
    assert choose(make_router({}), replicas, prefix)[0] == [replicas[1]]


def test_a_hot_prefix_does_not_overload_its_replica() -> None:
    prefix = prefix_of({"prompt": LONG})
    hot, idle = Replica("hot", links_of(prefix, 3)), Replica("idle")
    assert choose(make_router({"hot": 8, "idle": 0}), [hot, idle], prefix)[0] == [hot]
    assert len(choose(make_router({"hot": 9, "idle": 0}), [hot, idle], prefix)) == 1
    less = Replica("hot", links_of(prefix, 1))  # 256 of 600 characters: 3.4 of 8 requests
    assert choose(make_router({"hot": 3, "idle": 0}), [less, idle], prefix)[0] == [less]
    assert len(choose(make_router({"hot": 4, "idle": 0}), [less, idle], prefix)) == 1


def test_of_two_that_hold_the_same_the_idler_one_is_taken() -> None:
    prefix = prefix_of({"prompt": LONG})
    one, two = Replica("one", links_of(prefix, 3)), Replica("two", links_of(prefix, 3))
    assert choose(make_router({"one": 2, "two": 1}), [one, two], prefix)[0] == [two]


def test_what_was_just_sent_counts_until_the_replica_can_have_reported_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(router_module.time, "monotonic", lambda: clock.now)
    prefix = prefix_of(chat(PICTURE))
    replicas = [Replica("one"), Replica("two")]
    router = make_router({})
    assert len(choose(router, replicas, prefix)) == 1
    router.on_request_routed(pending(prefix), "two", None)  # type: ignore[arg-type]
    assert choose(router, replicas, prefix)[0] == [replicas[1]]
    assert len(choose(router, replicas[:1], prefix)) == 1  # "two" is gone
    clock.now += router_module.ROUTE_TTL
    assert len(choose(router, replicas, prefix)) == 1


def test_what_the_router_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_SENT", 4)
    router = make_router({})
    for index in range(10):
        prefix = prefix_of({"prompt": f"{index}{LONG}"})
        router.on_request_routed(pending(prefix), "one", None)  # type: ignore[arg-type]
    assert len(router._sent) == 4
    assert prefix.links[-1].hash in router._sent


# Settings


def test_settings_are_ours_and_the_engines() -> None:
    args = {
        "model": "7",
        "min_replicas": "2",
        "max_replicas": 4,
        "device": "cuda",
        "tensor_parallel_size": "2",
        "allowed_media_domains": '["a.com"]',
    }
    settings = read_settings(args)
    assert (settings.min_replicas, settings.max_replicas, settings.num_gpus) == (2, 4, 2)
    assert settings.target == 48
    assert settings.engine == {
        "model": "7",
        "device": "cuda",
        "tensor_parallel_size": 2,
        "allowed_media_domains": ("a.com",),
        "allowed_media_paths": (),
    }


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"replicas": 2}, "replicas: unknown"),
        ({"min_replicas": 0}, "min_replicas=0: must be"),
        ({"min_replicas": 3}, "max_replicas=1: must be at least min_replicas=3"),
        ({"num_ingress": "two"}, "num_ingress='two'"),
        ({"device": "auto"}, "device='auto': must be cpu or cuda"),
        ({"target_ongoing_requests": "-1"}, "target_ongoing_requests=-1"),
        ({"trace_file": "a"}, "trace_file: .* one file"),
        ({"workers": ["a:1"]}, "workers: .* ranks of a replica share a host; .* remove it"),
        ({"worker_tls": "/tls"}, "worker_tls: .* remove it"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
    ],
)
def test_wrong_settings_are_reported_by_name(args: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        read_settings(args)


def test_a_replicas_place_has_all_its_ranks_devices() -> None:
    from octavo.engine.replicas.app import _options

    options = _options(
        read_settings({"device": "cuda", "tensor_parallel_size": 4, "cpus_per_rank": 2})
    )
    assert options["placement_group_bundles"] == [{"CPU": 8, "GPU": 4}]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert options["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 4}
    assert options["num_replicas"] == 1
    scaled = _options(read_settings({"max_replicas": 3, "max_num_seqs": 8}))
    assert scaled["autoscaling_config"].target_ongoing_requests == 6
    assert scaled["max_ongoing_requests"] == 16
    assert "num_replicas" not in scaled
