"""Two clients at a time, one bad and one good, over every source of media (L41)."""

import base64
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx2
import numpy as np
import pytest

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.media.cases import encoded, mp4, noise, without_late_frames
from octavo.engine.client.errors import ClientError
from octavo.engine.media import source as sources
from octavo.engine.media.fetch import network as networking
from octavo.engine.media.fetch.fetch import Network
from octavo.tests.support.http_served import HttpServed

PUBLIC = "93.184.216.34"
SIZES = {"min_pixels": 3136, "max_pixels": 12544}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4}
PNG, JPEG, CLIP = encoded(noise(84, 56)), encoded(noise(120, 90), "JPEG"), mp4(40)
CUT_PNG, CUT_CLIP = encoded(noise(300, 200))[:-5000], without_late_frames(CLIP)
PIXELS = np.asarray(noise(84, 56))
NO_EMBEDS = octavo.MediaEmbeds(np.full((6, 64), np.nan, np.float32), (1, 4, 6))
EMBEDS = octavo.MediaEmbeds(np.zeros((6, 64), np.float32), (1, 4, 6))


class DecodingServers(HttpServed):
    """An engine that decodes in separate processes, behind gRPC and HTTP."""

    @property
    def num_started(self) -> int:
        pool = self.engine._pool._decoders
        assert pool is not None
        return pool.num_started


class FileServer:
    """Serves /good.png, /bad.png and /slow.png, over and over."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = self.listener.getsockname()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            head = connection.recv(4096)
            body = PNG if b"good" in head else CUT_PNG
            length = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall(length.encode())
            if b"slow" in head:
                time.sleep(0.2)
            connection.sendall(body)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecodingServers]:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    folder = tmp_path_factory.mktemp("files")
    (folder / "good.png").write_bytes(PNG)
    (folder / "bad.png").write_bytes(CUT_PNG)
    files = FileServer()

    def dial(address: str, port: int, seconds: float) -> socket.socket:
        return socket.create_connection(files.address, seconds)

    network = Network(lambda host, port: [PUBLIC], dial, networking.tls)
    patch = pytest.MonkeyPatch()
    patch.setattr(sources, "fetch", partial(sources.fetch, network=network))
    served = DecodingServers(
        checkpoint,
        isolate_media=True,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=16 << 20,
        allowed_media_paths=(folder,),
        allowed_media_domains=("a.org",),
        media_timeout_s=120,
    )
    served.folder = folder  # type: ignore[attr-defined]
    yield served
    served.wait_empty()
    served.close()
    files.listener.close()
    patch.undo()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **SIZES, **options}


def video(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **SIZES, **options}


def grpc_parts(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Good and bad parts of every source that `Client` takes."""
    server_file = octavo.ServerFile
    good = [
        image(PNG),
        image(uri(JPEG, "image/jpeg")),
        image(server_file(str(folder / "good.png"))),
        image("http://a.org/good.png"),
        image(PIXELS),
        {"type": "image", "image": EMBEDS},
        video(CLIP),
        video([PNG, PNG, PNG]),
        video([PIXELS, PIXELS]),
        video(np.stack([PIXELS] * 4)),
        video([uri(PNG), "http://a.org/good.png"]),
    ]
    bad = [
        image(CUT_PNG),
        image(PNG[:40]),
        image("data:image/png;base64,!!"),
        image(uri(CUT_PNG)),
        image(server_file("/etc/hostname")),
        image(server_file(str(folder / "bad.png"))),
        image("http://a.org/bad.png"),
        image("http://b.org/good.png"),
        image(PIXELS, min_pixels=9000, max_pixels=4000),
        {"type": "image", "image": NO_EMBEDS},
        video(CUT_CLIP),
        video(CLIP[:300]),
        video([PNG, CUT_PNG]),
        video([PNG, b"hello"]),
        video(CLIP, nframes=4000),
        video(np.stack([PIXELS] * 4), nframes=4),
    ]
    return good, bad


def http_parts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def of(kind: str, *urls: Any) -> list[dict[str, Any]]:
        return [{"type": kind, kind: {"url": url, **SIZES}} for url in urls]

    good = of("image_url", uri(PNG), "http://a.org/good.png")
    good += of("video_url", uri(CLIP, "video/mp4"), [uri(PNG), uri(PNG)])
    bad = of("image_url", uri(CUT_PNG), "data:image/png;base64,!!", "file:///nope.png")
    bad += of("image_url", "http://a.org/bad.png", "data:image/gif;base64,R0lGODlhAQABAAAAACw=")
    bad += of("video_url", uri(CUT_CLIP), [uri(PNG), uri(CUT_PNG)])
    return good, bad


def talk(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]


def grpc_ask(client: octavo.Client, part: dict[str, Any], **options: Any) -> str:
    """Empty, or the error's text."""
    try:
        for _ in client.chat(talk(part), **GREEDY, **options):
            pass
    except (ClientError, grpc.RpcError) as error:
        return str(error)
    return ""


def http_ask(client: httpx2.Client, part: dict[str, Any], **options: Any) -> str:
    body = {"messages": talk(part), **GREEDY, **options}
    answer = client.post("/v1/chat/completions", json=body)
    return "" if answer.status_code == 200 else answer.text


def grpc_leave(
    client: octavo.Client, address: str, part: dict[str, Any], rng: random.Random
) -> None:
    """Disconnect, or run out of time, while the media are being decoded."""
    if rng.random() < 0.5:
        grpc_ask(client, part, timeout_s=rng.uniform(0.001, 0.05))
        return
    with octavo.Client(address) as own:
        timer = threading.Timer(rng.uniform(0, 0.05), own.close)
        timer.start()
        with suppress(ClientError, grpc.RpcError, ValueError, RuntimeError):
            grpc_ask(own, part)
        timer.join()


def http_leave(client: httpx2.Client, _: str, part: dict[str, Any], rng: random.Random) -> None:
    with suppress(httpx2.HTTPError):
        if rng.random() < 0.5:
            http_ask(client, part, timeout_s=rng.uniform(0.001, 0.05))
        else:
            body = {"messages": talk(part), **GREEDY, "stream": True}
            client.post("/v1/chat/completions", json=body, timeout=rng.uniform(0.005, 0.05))


def stress(served: DecodingServers, way: str, rounds: int, seed: int, leaves: bool) -> list[str]:
    """Errors of the good client, while a bad one sends what is rejected, or leaves early."""
    rng, errors, is_over = random.Random(seed), [], threading.Event()
    folder: Path = served.folder  # type: ignore[attr-defined]
    good, bad = grpc_parts(folder) if way == "grpc" else http_parts()

    def connect() -> Any:
        if way == "grpc":
            return octavo.Client(served.address)
        return httpx2.Client(base_url=served.url, timeout=60)

    ask: Any = grpc_ask if way == "grpc" else http_ask
    leave: Any = grpc_leave if way == "grpc" else http_leave

    def be_good() -> None:
        with connect() as client:
            for number in range(1 << 30):
                if is_over.is_set():
                    return
                error = ask(client, good[number % len(good)])
                if error:
                    errors.append(f"{good[number % len(good)]['type']} {number}: {error}")

    thread = threading.Thread(target=be_good)
    thread.start()
    with connect() as client:
        for number in range(rounds):
            if leaves:
                leave(client, served.address, rng.choice(good + bad), rng)
            elif not ask(client, bad[number % len(bad)]):
                errors.append(f"bad {number % len(bad)} was answered")
    is_over.set()
    thread.join(60)
    return errors


def warm(served: DecodingServers) -> None:
    """Start a decoder, and see that each source is good."""
    with octavo.Client(served.address) as client:
        for part in grpc_parts(served.folder)[0]:  # type: ignore[attr-defined]
            assert grpc_ask(client, part) == ""


@pytest.mark.lesson("L41")
@pytest.mark.parametrize("way", ["grpc", "http"])
def test_reused_helper_no_good_request_fails_beside_rejected_ones(
    served: DecodingServers, way: str
) -> None:
    warm(served)
    started = served.num_started
    assert stress(served, way, 48, 1, leaves=False) == []
    assert served.num_started <= max(started, 6)  # at most one more for each lane's second


@pytest.mark.lesson("L41")
@pytest.mark.parametrize("way", ["grpc", "http"])
def test_reused_helper_no_good_request_fails_beside_clients_that_leave(
    served: DecodingServers, way: str
) -> None:
    assert stress(served, way, 40, 2, leaves=True) == []


@pytest.mark.lesson("L41")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["grpc", "http"])
@pytest.mark.parametrize("leaves", [False, True])
def test_reused_helper_two_thousand_bad_requests(
    served: DecodingServers, way: str, leaves: bool
) -> None:
    warm(served)
    started = served.num_started
    assert stress(served, way, 2000, 3, leaves) == []
    print(f"{way}, leaves={leaves}: {served.num_started - started} decoders started")
    if not leaves:
        assert served.num_started <= max(started, 6)
