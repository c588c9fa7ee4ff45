"""What remote workers are made of: addresses, fingerprints of checkpoints, the ranks' meeting."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.errors import ConfigError
from octavo.engine.worker.remote import rendezvous
from octavo.engine.worker.remote.address import Address, interface_towards
from octavo.engine.worker.remote.fingerprint import fingerprint
from octavo.engine.worker.remote.rendezvous import Rendezvous, SharedStore
from octavo.engine.worker.remote.torch_store import RendezvousStore
from octavo.proto import worker_pb2 as pb


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("10.0.0.2:7000", "10.0.0.2", 7000, False),
        (" [fd00::1]:1 ", "fd00::1", 1, False),
        ("[::1]:65535", "::1", 65535, True),
        ("127.8.9.1:0", "127.8.9.1", 0, True),
        ("localhost:80", "localhost", 80, True),
        ("node-1.cluster.local:80", "node-1.cluster.local", 80, False),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
    ],
)
def test_addresses(text: str, host: str, port: int, is_loopback: bool) -> None:
    address = Address.parse(text, "--listen")
    assert (address.host, address.port, address.is_loopback) == (host, port, is_loopback)
    assert str(address) == text.strip()


@pytest.mark.parametrize(
    "text", ["", "host", ":80", "host:", "host:x", "a:b:80", "[::1]", "a:65536"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--listen=.*must be HOST:PORT"):
        Address.parse(text, "--listen")


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:127.0.0.1:5000", "lo"),
        ("ipv6:%5B::1%5D:5000", "lo"),
        ("unix:/tmp/x", None),
        ("ipv4:nonsense:1", None),
        ("", None),
    ],
)
def test_the_interface_by_which_the_engine_comes(peer: str, name: str | None) -> None:
    if peer.startswith("ipv6:") and "lo" not in Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 here")
    assert interface_towards(peer) == name


def test_a_copy_has_the_same_fingerprint_however_its_files_are_cut(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_tiny_checkpoint(one)
    write_tiny_checkpoint(two)
    tensors = load_file(two / "model.safetensors")
    (two / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, two / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}, indent=9))
    assert fingerprint(one) == fingerprint(two)


@pytest.mark.parametrize("place", ["first", "last"])
def test_weights_that_were_trained_further_have_another(tmp_path: Path, place: str) -> None:
    write_tiny_checkpoint(tmp_path)
    before = fingerprint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    tensors[name].view(-1)[0 if place == "first" else -1] += 0.5
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_another_normalisation_of_pixels_has_another(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    before = fingerprint(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**raw, "image_mean": [0.1, 0.2, 0.3]}))
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_none_is_reported(tmp_path: Path, content: bytes) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        fingerprint(tmp_path)


class Rank:
    """A worker's meeting, and an engine's thread that answers it."""

    def __init__(self, shared: SharedStore, ours: Rendezvous | None = None) -> None:
        self.meeting, self._open = ours or Rendezvous(), True
        self.store = RendezvousStore(self.meeting)
        self._shared = shared
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        replies: list[pb.StoreReply] = []
        for request in self.meeting.serve(iter(replies.pop, None), lambda: self._open):
            replies.append(self._shared.answer(request))

    def close(self) -> None:
        self._open = False


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rendezvous, "OPEN_CHECK", 0.05)
    shared = SharedStore()
    made = [Rank(shared) for _ in range(2)]
    yield made
    for each in made:
        each.close()


def test_the_store_does_as_torchs_own(ranks: list[Rank]) -> None:
    theirs = dist.HashStore()
    for ours in ((each.store for each in ranks), (theirs, theirs)):
        one, two = ours
        one.set("a", b"\x00\xff")
        assert two.get("a") == b"\x00\xff"
        assert [one.add("n", 2), two.add("n", 3), one.add("n", -1)] == [2, 5, 4]
        assert two.get("n") == b"4"
        assert one.check(["a", "n"]) and not one.check(["a", "b"])
        assert one.compare_set("c", "", "first") == b"first"
        assert two.compare_set("c", "wrong", "second") == b"first"
        assert two.compare_set("c", "first", "second") == b"second"
        assert one.delete_key("a") and not one.delete_key("a")
        with pytest.raises(RuntimeError):
            one.wait(["b"], timedelta(milliseconds=50))


def test_a_rank_waits_for_what_another_sets(ranks: list[Rank]) -> None:
    threading.Timer(0.1, ranks[1].store.set, ("late", "here")).start()
    ranks[0].store.wait(["late"])
    assert ranks[0].store.get("late") == b"here"


def test_ranks_meet_by_it(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of torch's in one process: their sum comes out, and nothing but the store told
    them of each other."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(ranks[rank].store, rank, 2, timedelta(seconds=20))
        tensor = torch.full((3,), rank + 1.0)
        group.allreduce([tensor]).wait()
        found[rank] = tensor.tolist()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[3.0] * 3] * 2


def test_a_stream_that_breaks_fails_what_was_asked_by_it_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "OPEN_CHECK", 0.05)
    ours = Rendezvous()
    store, failed = RendezvousStore(ours), threading.Event()

    def ask() -> None:
        with pytest.raises(RuntimeError, match="does not answer"):
            store.get("a")
        failed.set()

    def broken() -> Any:
        yield pb.StoreReply(value=b"of another question")
        raise ConnectionError

    replies = broken()
    next(replies)
    stream = ours.serve(replies, lambda: True)
    threading.Thread(target=ask, daemon=True).start()
    assert next(stream).key == "a"
    with pytest.raises(ConnectionError):
        next(stream)
    assert failed.wait(5)
    shared = SharedStore()
    shared.answer(pb.StoreRequest(key="b", set=b"B"))
    rank = Rank(shared, ours)  # the stream that is opened again
    assert store.get("b") == b"B"
    rank.close()


def test_a_later_stream_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Rendezvous()
    first = ours.serve(iter(()), lambda: True)
    done = threading.Thread(target=lambda: next(first, None), daemon=True)
    done.start()
    rank = Rank(SharedStore(), ours)
    done.join(5)
    assert not done.is_alive()
    assert rank.store.add("n", 1) == 1
    rank.close()


def test_a_late_reply_is_no_other_question_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "ASK_TIMEOUT", 0.05)
    ours, replies = Rendezvous(), [pb.StoreReply(value=b"B"), pb.StoreReply(value=b"A")]
    stream = ours.serve(iter(replies.pop, None), lambda: True)
    with pytest.raises(RuntimeError, match="does not answer"):
        ours.ask(pb.StoreRequest(key="nobody serves"))
    monkeypatch.setattr(rendezvous, "ASK_TIMEOUT", 5.0)
    answers: list[Any] = []
    asker = threading.Thread(
        target=lambda: answers.append(ours.ask(pb.StoreRequest(key="a"))), daemon=True
    )
    asker.start()
    assert next(stream).key == "a"  # and not the one that was given up
    threading.Thread(target=lambda: next(stream, None), daemon=True).start()
    asker.join(5)
    assert answers == [b"A"]


def test_an_engine_that_is_gone_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "ASK_TIMEOUT", 0.05)
    with pytest.raises(RuntimeError, match="the engine does not answer"):
        RendezvousStore(Rendezvous()).set("a", "b")
