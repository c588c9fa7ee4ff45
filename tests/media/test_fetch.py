"""What may be fetched and read, against servers on loopback that do all they can.

Names resolve as each test says, and what is dialled is noted; a public address is then a server
of the test. So the rule itself runs as it is, without a switch that lets loopback through.
"""

import io
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.media.cases import encoded, noise
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import ConfigError, InputError
from octavo.engine.input.processor import InputProcessor
from octavo.engine.media import source as sources
from octavo.engine.media.decode.opening import open_here
from octavo.engine.media.fetch import fetch as fetching
from octavo.engine.media.fetch import network as networking
from octavo.engine.media.fetch.addresses import is_public
from octavo.engine.media.fetch.fetch import Network, fetch
from octavo.engine.media.fetch.urls import is_allowed, read_host, read_url, without_secrets
from octavo.engine.media.source import MediaAccess, media_access, open_source
from octavo.engine.media.task import MediaTask

PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::1"
LIMITS = MediaLimits(max_media_bytes=1 << 20, fetch_timeout_s=5)
HURRY = MediaLimits(max_media_bytes=1 << 20, fetch_timeout_s=0.3)
Talk = Callable[[socket.socket], None]


def reply(body: bytes = b"hello", status: str = "200 OK", **headers: Any) -> bytes:
    lines = {"Content-Length": len(body), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


def moved(where: str, status: str = "302 Found") -> bytes:
    return reply(b"", status, Location=where)


class Server:
    """Takes connections, notes what was asked, and says what it is told to."""

    def __init__(self, talk: bytes | Talk, tls: ssl.SSLContext | None = None) -> None:
        self.talk, self.tls = talk, tls
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with suppress(OSError), sock:
                sock.settimeout(10)
                self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        with self.tls.wrap_socket(sock, server_side=True) if self.tls else sock as secure:
            request = b""
            while b"\r\n\r\n" not in request:
                data = secure.recv(4096)
                if not data:
                    return
                request += data
            self.asked.append(request.decode())
            if callable(self.talk):
                self.talk(secure)
            else:
                secure.sendall(self.talk)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@dataclass
class World:
    """Names and addresses as a test has them."""

    names: dict[str, Sequence[str]] = field(default_factory=dict)
    servers: dict[str, Server] = field(default_factory=dict)  # by address
    resolved: list[str] = field(default_factory=list)
    dialled: list[tuple[str, int]] = field(default_factory=list)
    tls: Callable[[], ssl.SSLContext] = networking.tls

    def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        if host in self.names:
            return self.names[host]
        if read_host(f"[{host}]" if ":" in host else host) and host[-1].isdigit():
            return [host]  # an address is its own
        raise socket.gaierror(-2, "Name or service not known")

    def dial(self, address: str, port: int, seconds: float) -> socket.socket:
        self.dialled.append((address, port))
        if address not in self.servers:
            raise ConnectionRefusedError
        return socket.create_connection(("127.0.0.1", self.servers[address].port), seconds)

    @property
    def network(self) -> Network:
        return Network(self.resolve, self.dial, self.tls)

    def fetch(
        self,
        url: str = "http://a.example/x.png?key=secret",
        domains: Sequence[str] = ("*",),
        limits: MediaLimits = LIMITS,
    ) -> bytes:
        with fetch(url, domains, "image", MediaTask(limits), self.network) as file:
            assert file.seekable() and file.tell() == 0
            return file.read()

    def refused(self, url: str = "http://a.example/x.png?key=secret", **more: Any) -> str:
        with pytest.raises(InputError) as error:
            self.fetch(url, **more)
        assert error.value.field == "image"
        text = str(error.value).replace(without_secrets(url), "URL")
        for leak in ("secret", "127.0.0.1:", "0x", "Errno", "urllib3", "HTTPConnection", "[SSL"):
            assert leak not in text
        return text


@contextmanager
def world(talk: bytes | Talk = b"", tls: ssl.SSLContext | None = None) -> Iterator[World]:
    """a.example is a server that says `talk`."""
    server = Server(talk, tls)
    made = World({"a.example": [PUBLIC]}, {PUBLIC: server})
    try:
        yield made
    finally:
        server.close()


@pytest.mark.lesson("L19")
def test_ssrf_fetching_is_off_until_a_domain_is_named() -> None:
    with world(reply()) as net:
        text = net.refused(domains=())
        assert "--allow-media-domains" in text and "allowed_media_domains" in text
        assert not net.resolved and not net.dialled
        assert net.fetch(domains=("a.example",)) == b"hello"


@pytest.mark.lesson("L19")
def test_ssrf_what_is_asked() -> None:
    """By name, at the address that was checked; no proxy, and nothing of this machine's."""
    with world(reply()) as net:
        assert net.fetch("HTTP://A.Example:80/p%20q/ü?a=b#part") == b"hello"
        assert net.dialled == [(PUBLIC, 80)] and net.resolved == ["a.example"]
        first, *lines = net.servers[PUBLIC].asked[0].strip().split("\r\n")
        assert first == "GET /p%20q/%C3%BC?a=b HTTP/1.1"
        expected = ["Accept-Encoding: identity", "Accept: */*", "Host: a.example"]
        assert sorted(lines) == [*expected, "User-Agent: octavo"]


@pytest.mark.lesson("L19")
def test_ssrf_proxies_of_the_environment_have_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    with world(reply()) as net, world(reply(b"proxy")) as proxy:
        there = f"http://127.0.0.1:{proxy.servers[PUBLIC].port}"
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, there)
        assert net.fetch() == b"hello"
        assert not proxy.servers[PUBLIC].asked


@pytest.mark.lesson("L19")
@pytest.mark.parametrize(
    ("host", "domains", "allowed"),
    [
        ("a.example", ["a.example"], True),
        ("a.example", ["b.example", "*"], True),
        ("b.a.example", ["a.example"], False),
        ("b.a.example", ["*.a.example"], True),
        ("c.b.a.example", ["*.a.example"], True),
        ("a.example", ["*.a.example"], False),
        ("aa.example", ["*.a.example", "a.example"], False),
        ("a.example.evil.com", ["a.example", "*.a.example"], False),
        ("evila.example", ["*.a.example"], False),
        ("1.2.3.4", ["*.3.4", "1.2.3"], False),
        ("a.example", [], False),
    ],
)
def test_ssrf_domains(host: str, domains: list[str], allowed: bool) -> None:
    assert is_allowed(host, domains) is allowed
    if not allowed and domains:
        net = World({host: [PUBLIC]})
        text = net.refused(f"http://{host}/", domains=domains)
        assert "not an allowed domain" in text and "send the bytes" in text
        assert not net.resolved


CLOSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::808:808",
    "100::1",
    "2001::1",
    "2001:2::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2002:808:808::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1%1",
    "fec0::1",
    "ff02::1",
    "1:2::3",
]
OPEN = [
    "1.1.1.1",
    "8.8.8.8",
    "11.0.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "172.15.0.1",
    "172.32.0.1",
    "192.0.1.1",
    "192.167.1.1",
    "223.255.255.255",
    "2001:200::1",
    "2606:4700:4700::1111",
    "2a00:1450:4001::1",
    "64:ff9b::8.8.8.8",
]


@pytest.mark.lesson("L19")
@pytest.mark.parametrize("address", CLOSED)
def test_ssrf_closed_addresses(address: str) -> None:
    """Alone, and among public ones: first, last."""
    assert not is_public(address)
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        net = World({"a.example": answer})
        text = net.refused()
        assert "not public" in text and address not in text
        assert not net.dialled


@pytest.mark.lesson("L19")
def test_ssrf_open_addresses() -> None:
    assert all(map(is_public, OPEN))
    assert not any(
        map(is_public, ("", "a.example", "1.2.3", "0x7f.0.0.1", "010.0.0.1", "1.1.1.1 "))
    )


@pytest.mark.lesson("L19")
def test_ssrf_unknown_and_inner_names_look_alike() -> None:
    net = World({"inner.example": ["10.1.2.3"], "none.example": []})
    texts = {
        net.refused(f"http://{name}.example/").replace(name, "")
        for name in ("inner", "none", "never")
    }
    assert len(texts) == 1


@pytest.mark.lesson("L19")
def test_ssrf_this_machine_by_the_systems_own_resolver() -> None:
    """Whatever the spelling, with all domains allowed and nothing replaced but the dialling."""
    dialled: list[str] = []

    def dial(address: str, port: int, seconds: float) -> socket.socket:
        dialled.append(address)
        raise AssertionError(address)

    for host in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"):
        with pytest.raises(InputError, match="not public"):
            fetch(f"http://{host}/", ("*",), "image", MediaTask(LIMITS), Network(dial=dial))
    assert not dialled


@pytest.mark.lesson("L19")
def test_ssrf_the_systems_dial_goes_where_it_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = networking.dial(*listener.getsockname(), 1.0)
        assert sock.getpeername() == listener.getsockname()
        sock.close()


@pytest.mark.lesson("L19")
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1\\@a.example/",
        "http://a.example\\@127.0.0.1/",
        "http://a.example\\.evil.com/",
        "http:\\\\127.0.0.1/",
        "http://a.example@127.0.0.1/",
        "http://127.0.0.1@a.example/",
        "http://user:secret@a.example/",
        "http://a.example:80@127.0.0.1/",
        "http://a.example:secret@127.0.0.1:80/",
        "http://127.0.0.1#@a.example/",
        "http://127.0.0.1?@a.example/",
        "http://127.0.0.1 /",
        "http://a.example\t.evil.com/",
        "http://a.example/\r\nHost: b.example",
        "http://127。0。0。1/",
        "http://①②⑦.⓪.⓪.①/",
        "http://a。example/",
        "http://ａ.example/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://127.1/",
        "http://127.0.0.1./",
        "http://1.2.3.4.5/",
        "http://256.256.256.256/",
        "http://a.0x/",
        "http://%31%32%37.0.0.1/",
        "http://a.example%2f@127.0.0.1/",
        "http://a.example%00.evil.com/",
        "http://[::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::1/",
        "http://[1.2.3.4]/",
        "http://[a.example]/",
        "http://[::1]a.example/",
        "http://a.example./",
        "http://.a.example/",
        "http://a..example/",
        "http://-a.example/",
        "http://" + "a." * 130 + "example/",
        "http://" + "a" * 64 + ".example/",
        "http://a.example:8080/",
        "http://a.example:443/",
        "https://a.example:80/",
        "http://a.example:22/",
        "http://a.example:0/",
        "http://a.example:65616/",
        "http://a.example:99999999999/",
        "http://a.example:+80/",
        "http://a.example:８０/",
        "http://a.example:80:80/",
        "http:///a.example/",
        "http://",
        "http://?a.example",
        "http:a.example",
        "http://a.example/" + "x" * 9000,
        "ftp://a.example/",
        "file:///etc/passwd",
        "gopher://a.example/",
        "//a.example/",
        "a.example",
        "",
    ],
)
def test_ssrf_tricks_with_urls(url: str) -> None:
    """Refused, or read as one host that is then checked; never another host than was checked."""
    with world(reply()) as net:
        net.names["a.example"] = [PUBLIC]
        text = net.refused(url, domains=("a.example", "127.0.0.1"))
        assert not net.dialled and len(text) < 500
    if "://" in url and "\n" not in url:  # a redirect is read the same way
        answer = moved(url.encode().decode("latin-1"))
        with world(answer) as net:
            net.names["b.example"] = [PUBLIC]
            net.refused("http://b.example/", domains=("b.example", "a.example", "127.0.0.1"))
            assert set(net.dialled) == {(PUBLIC, 80)}


@pytest.mark.lesson("L19")
def test_ssrf_plain_urls_are_read() -> None:
    for url in (
        "http://a.example",
        "http://a.example:/",
        "http://A.EXAMPLE:80",
        "http://a.example?",
    ):
        assert read_url(url).host == "a.example"
    assert read_url("https://[2606:2800:0220::0001]:443/@x").url == "https://[2606:2800:220::1]/@x"
    assert read_url("http://93.184.216.34/a/../b").path == "/b"
    assert read_url("http://under_score.a-b.example/").host == "under_score.a-b.example"
    with world(reply()) as net:
        net.servers[OTHER] = net.servers[PUBLIC]
        assert net.fetch(f"http://[{OTHER}]/", domains=(OTHER,)) == b"hello"
        assert net.dialled == [(OTHER, 80)]
        assert f"Host: [{OTHER}]\r\n" in net.servers[OTHER].asked[0]


@pytest.mark.lesson("L19")
def test_ssrf_secrets_of_a_url_are_not_shown() -> None:
    shown = without_secrets("https://me:secret@a.example/p?sig=secret#secret")
    assert "secret" not in shown and "a.example/p?" in shown
    assert len(without_secrets("http://a.example/" + "x" * 10_000)) < 200


@pytest.mark.lesson("L19")
def test_ssrf_a_name_that_turns_is_dialled_where_it_was_checked() -> None:
    """It is resolved once; a second answer, of an inner address, is never asked for or used."""
    answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
    with world(reply()) as net:
        network = Network(lambda host, port: next(answers), net.dial)
        with fetch("http://a.example/", ("*",), "image", MediaTask(LIMITS), network) as file:
            assert file.read() == b"hello"
        assert net.dialled == [(PUBLIC, 80)]
        with pytest.raises(InputError, match="not public"):
            fetch("http://a.example/", ("*",), "image", MediaTask(LIMITS), network)
        assert len(net.dialled) == 1
    answers = iter([[PUBLIC], ["10.0.0.1"]])  # between a URL and its redirect to the same name
    with world(moved("/again")) as net:
        network = Network(lambda host, port: next(answers), net.dial)
        with pytest.raises(InputError, match="not public"):
            fetch("http://a.example/", ("*",), "image", MediaTask(LIMITS), network)
        assert net.dialled == [(PUBLIC, 80)]


@pytest.mark.lesson("L19")
def test_ssrf_another_checked_address_where_one_does_not_answer() -> None:
    with world(reply()) as net:
        net.names["a.example"] = [OTHER, PUBLIC]
        assert net.fetch() == b"hello"
        assert net.dialled == [(OTHER, 80), (PUBLIC, 80)]
        net.names["a.example"] = [f"8.8.8.{end}" for end in range(9)]
        assert "does not answer" in net.refused()
        assert len(net.dialled) == 2 + fetching.MAX_DIALLED


@pytest.mark.lesson("L19")
@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
def test_ssrf_redirects_are_followed(status: str) -> None:
    with world(moved("//b.example/ü?x", f"{status} Go")) as net, world(reply()) as second:
        net.names["b.example"], net.servers["1.1.1.1"] = ["1.1.1.1"], second.servers[PUBLIC]
        assert net.fetch() == b"hello"
        assert net.dialled == [(PUBLIC, 80), ("1.1.1.1", 80)]
        assert "Host: b.example\r\n" in second.servers[PUBLIC].asked[0]
        assert "secret" not in second.servers[PUBLIC].asked[0]


@pytest.mark.lesson("L19")
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("http://127.0.0.1/", "not public"),
        ("http://inner.example/", "not public"),
        ("http://169.254.169.254/latest/meta-data/", "not public"),
        ("http://[::1]/", "not public"),
        ("http://[::ffff:10.0.0.1]/", "not public"),
        ("file:///etc/passwd", "not an http"),
        ("ftp://a.example/", "not an http"),
        ("data:image/png;base64,AAAA", "not an http"),
        ("javascript:alert(1)", "not an http"),
        ("http://b.example:22/", "port 22"),
        ("http://me:secret@b.example/", "user name"),
        ("http://[::1", "not a valid URL"),
        ("http://a.example\\@127.0.0.1/", "backslash"),
        ("/x.png?key=secret", "redirects more than 5 times"),
        ("", "status 302"),
    ],
)
def test_ssrf_redirects_are_checked_again(where: str, words: str) -> None:
    with world(moved(where)) as net:
        net.names["inner.example"] = ["10.9.8.7"]
        text = net.refused()
        assert words in text
        assert not [each for each in ("10.9.8.7", "169.254", "::1", "127.0.0.1") if each in text]
        assert {address for address, _ in net.dialled} == {PUBLIC}
        assert len(net.dialled) == (6 if "more than" in words else 1)


@pytest.mark.lesson("L19")
def test_ssrf_a_redirect_leaves_the_list() -> None:
    with world(moved("http://b.example/")) as net:
        net.names["b.example"] = ["1.1.1.1"]
        text = net.refused(domains=("a.example",))
        assert "b.example is not an allowed domain" in text
        assert net.resolved == ["a.example"]
    with world(moved("http://10.0.0.1/")) as net:
        assert "10.0.0.1" not in net.refused(domains=("a.example",))


@pytest.mark.lesson("L19")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(b"", "404 Not Found"), "status 404"),
        (reply(b"x", "206 Partial"), "status 206"),
        (reply(b"", "204 No Content"), "status 204"),
        (reply(b"", "304 Not Modified"), "status 304"),
        (reply(b"", "103 Early Hints"), "status 103"),
        (reply(b"", "500 Oh"), "status 500"),
        (reply(b""), "no bytes"),
        (reply(Content_Length=9), "connection"),
        (reply(Content_Length=-1), "not a number"),
        (reply(Content_Length="5, 5"), "not a number"),
        (reply(Content_Length="five"), "not a number"),
        (reply(Content_Length="0x5"), "not a number"),
        (reply(Content_Length="٥".encode().decode("latin-1")), "not a number"),
        (reply(Content_Length=1 << 20 | 1), "--max-media-bytes"),
        (reply(Content_Length=10**30), "--max-media-bytes"),
        (reply(Content_Length="9" * 5000), "--max-media-bytes"),
        (reply(Content_Encoding="gzip"), "compressed"),
        (reply(Content_Encoding="br, identity"), "compressed"),
        (reply(Transfer_Encoding="gzip, chunked", Content_Length=None), "compressed"),
        (reply(b"5\r\nhello\r\n", Transfer_Encoding="chunked"), "connection"),
        (reply(b"5\r\nhel", Transfer_Encoding="chunked"), "connection"),
        (reply(b"hello", Transfer_Encoding="chunked"), "connection"),
        (reply(b"-5\r\nhello\r\n0\r\n\r\n", Transfer_Encoding="chunked"), "connection"),
        (reply(b"F" * 40 + b"\r\nhello", Transfer_Encoding="chunked"), "connection"),
        (b"", "connection"),
        (b"hello\r\n\r\n", "connection"),
        (b"HTTP/1.1 two hundred\r\n\r\n", "connection"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\nx", "connection"),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * 70_000 + b"\r\n\r\nx", "connection"),
        (b"\x16\x03\x01" * 50, "connection"),
    ],
)
def test_ssrf_answers_that_are_rejected(answer: bytes, words: str) -> None:
    with world(answer) as net:
        assert words in net.refused()


@pytest.mark.lesson("L19")
def test_ssrf_lengths_that_are_taken() -> None:
    """A body ends where its length says, where its last chunk ends, or with the connection."""
    chunks = b"3\r\nhel\r\n2;note=x\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"
    for answer in (
        reply(b"hello and more", Content_Length=5),
        reply(Content_Length=None),
        reply(chunks, Transfer_Encoding="chunked", Content_Length=None),
        reply(Content_Encoding="identity", Content_Type="text/plain"),
    ):
        with world(answer) as net:
            assert net.fetch() == b"hello"


def endless(head: bytes, body: bytes) -> Talk:
    def talk(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(body)

    return talk


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.lesson("L19")
@pytest.mark.parametrize(
    "talk",
    [
        endless(HEAD + b"\r\n", b"x" * 65536),
        endless(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        endless(CHUNKED + b"7fffffffffff\r\n", b"x" * 65536),
        endless(CHUNKED + b"-1\r\n", b"x" * 65536),
    ],
    ids=["to_the_end", "chunks", "one_chunk", "a_chunk_of_minus_one"],
)
def test_ssrf_a_body_without_end(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut at the limit, and no more than that is ever held or asked for at once."""
    taken = []
    some = fetching._Fetch._some

    def noted(own: Any, response: Any) -> bytes:
        data = some(own, response)
        taken.append(len(data))
        return data

    monkeypatch.setattr(fetching._Fetch, "_some", noted)
    with world(talk) as net:
        assert "--max-media-bytes" in net.refused()
    assert max(taken) <= fetching.READ and sum(taken) <= LIMITS.max_media_bytes + fetching.READ


def drip(head: bytes, drop: bytes) -> Talk:
    def talk(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(drop)
            time.sleep(0.02)

    return talk


def silent(sock: socket.socket) -> None:
    with suppress(OSError):
        while sock.recv(1):
            pass


@pytest.mark.lesson("L19")
@pytest.mark.parametrize(
    "talk",
    [
        drip(b"", b"H"),
        drip(HEAD, b"a: b\r\n"),
        drip(HEAD + b"a: ", b"b"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(HEAD + b"Content-Length: 1000\r\n\r\n", b"x"),
        drip(HEAD + b"\r\n", b"x"),
        drip(CHUNKED, b"1"),
        drip(CHUNKED + b"0\r\n", b"a: b\r\n"),
        silent,
    ],
    ids=["status", "headers", "header", "continue", "body", "end", "chunk", "trailers", "silence"],
)
def test_ssrf_drips_are_cut_off_in_all(talk: Talk) -> None:
    """Each byte comes well within any timeout of a read. The server goes on for 10 s."""
    with world(talk) as net:
        assert "--fetch-timeout-s" in net.refused(limits=HURRY)


@pytest.mark.lesson("L19")
def test_ssrf_names_and_connections_that_take_for_ever() -> None:
    hold = threading.Event()
    network = Network(lambda host, port: [PUBLIC] if hold.wait(20) else [])
    with pytest.raises(InputError, match="--fetch-timeout-s"):
        fetch("http://a.example/", ("*",), "image", MediaTask(HURRY), network)
    hold.set()
    net = World({"a.example": [PUBLIC, OTHER, "1.1.1.1"]})
    shares = []

    def dial(address: str, port: int, seconds: float) -> socket.socket:
        shares.append(seconds)
        time.sleep(seconds)
        raise TimeoutError

    with pytest.raises(InputError, match="--fetch-timeout-s"):
        fetch("http://a.example/", ("*",), "image", MediaTask(HURRY), Network(net.resolve, dial))
    assert len(shares) == 3 and sum(shares) <= HURRY.fetch_timeout_s


@pytest.mark.lesson("L19")
def test_ssrf_one_time_for_all_redirects() -> None:
    def talk(sock: socket.socket) -> None:
        time.sleep(0.1)
        sock.sendall(moved("/next"))

    with world(talk) as net:
        assert "--fetch-timeout-s" in net.refused(limits=HURRY)
        assert len(net.dialled) <= 4


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate that it signed itself, and that of who trusts it."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    extra = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    files = ["-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run([*command.split(), *extra, *files], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl here to make a certificate")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=cert)


@pytest.mark.lesson("L19")
def test_ssrf_certificates_are_checked_by_name(tmp_path: Path) -> None:
    """Against the name, though an address is dialled; the name is also what the server hears."""
    server, client = certificate(tmp_path, "a.example")
    heard: list[Any] = []
    server.sni_callback = lambda sock, name, context: heard.append(name)
    with world(reply(), server) as net:
        net.tls = lambda: client
        assert net.fetch("https://a.example/") == b"hello"
        assert net.dialled == [(PUBLIC, 443)] and heard == ["a.example"]
        assert "Host: a.example\r\n" in net.servers[PUBLIC].asked[0]
        net.names["b.example"] = [PUBLIC]
        assert "certificate" in net.refused("https://b.example/")
        assert "certificate" in net.refused(f"https://{PUBLIC}/")
        net.tls = networking.tls  # the system's authorities, who do not know it
        assert "certificate" in net.refused("https://a.example/")
        assert len(net.servers[PUBLIC].asked) == 1


@pytest.mark.lesson("L19")
def test_ssrf_https_is_not_left_and_not_dripped(tmp_path: Path) -> None:
    server, client = certificate(tmp_path, "a.example")
    with world(moved("http://a.example/"), server) as net:
        net.tls = lambda: client
        assert "from https to http" in net.refused("https://a.example/")
        assert net.dialled == [(PUBLIC, 443)]
    with world(drip(HEAD + b"\r\n", b"x"), server) as net:
        net.tls = lambda: client
        assert "--fetch-timeout-s" in net.refused("https://a.example/", limits=HURRY)


@pytest.mark.lesson("L19")
@pytest.mark.parametrize(
    ("first", "words"),
    [(b"\x16\x03\x03\x40\x00", "--fetch-timeout-s"), (b"HTTP/1.1 400 Bad\r\n\r\n", "connection")],
)
def test_ssrf_no_handshake(first: bytes, words: str) -> None:
    """A TLS record of which a byte comes now and then; and no TLS at all."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        sock, _ = listener.accept()
        with suppress(OSError), sock:
            sock.sendall(first)
            while not stop.wait(0.02):
                sock.sendall(b"\x02")

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    network = Network(
        lambda host, port: [PUBLIC], lambda *_: socket.create_connection(listener.getsockname())
    )
    with listener, pytest.raises(InputError, match=words):
        fetch("https://a.example/", ("*",), "image", MediaTask(HURRY), network)
    stop.set()
    thread.join(10)


def test_large_bodies_wait_on_disk_and_small_ones_do_not() -> None:
    limits = MediaLimits()
    for size in (1000, fetching.IN_MEMORY + 1):
        body = os.urandom(size)
        with world(reply(body)) as net:
            with fetch(
                "http://a.example/", ("*",), "image", MediaTask(limits), net.network
            ) as file:
                assert isinstance(file, io.BytesIO) == (size == 1000)
                assert file.read() == body and file.seek(5) == 5 and file.read(3) == body[5:8]
            if size > 1000:
                assert not isinstance(file.name, str)  # type: ignore[unreachable]


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.lesson("L19")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
def test_ssrf_nothing_stays_open() -> None:
    """Sockets, threads, files, whatever the end."""
    bodies = [
        reply(),
        reply(Content_Length=9),
        moved("ftp://x/"),
        endless(HEAD + b"\r\n", b"x" * 99),
    ]
    before, threads = open_files(), threading.active_count()
    for body in bodies:
        with world(body) as net, suppress(InputError):
            net.fetch()
    assert len(open_files()) <= len(before) and threading.active_count() <= threads


def picture_at(url: str, access: MediaAccess, kind: str = "image") -> Any:
    file = open_source(url, access, kind, MediaTask(LIMITS))
    with open_here(kind, file, LIMITS, kind) as reader:
        size = reader.header
        return next(iter(reader.frames([0], size.height, size.width))).pixels


def test_a_picture_from_the_web(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise()
    with world(reply(encoded(image), Content_Type="text/html")) as net:
        monkeypatch.setattr(sources, "fetch", partial(fetch, network=net.network))
        access = media_access([], ["*.example"], local=False)
        for url in ("http://a.example/x", "HTTP://A.EXAMPLE/x"):
            np.testing.assert_array_equal(picture_at(url, access), np.asarray(image))
        with pytest.raises(InputError, match="--allow-media-domains"):
            picture_at("http://a.example/x", MediaAccess())


@pytest.mark.lesson("L20")
def test_url_in_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but an item's own field is fetched: no link in a text, a name or an unused key."""
    folder = write_tiny_checkpoint(tmp_path)
    with world(reply(encoded(noise(56, 56)))) as net:
        monkeypatch.setattr(sources, "fetch", partial(fetch, network=net.network))
        config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
        access = MediaAccess(domains=("*",))
        processor = InputProcessor(folder, config, preprocess, 4096, access=access)
        link = "http://a.example/x.png"
        words = f"See {link} ![]({link}) <img src='{link}'> file:///etc/passwd {link}"
        for content in (words, [{"type": "text", "text": words}], [{"type": "text", "text": link}]):
            ready = processor.from_prompt([{"role": "user", "content": content}])
            assert ready.media == () and not net.resolved
        part = {"type": "image", "image": link}
        talk = [{"role": "user", "content": [part, {"type": "text", "text": words}]}]
        assert len(processor.from_prompt(talk).media) == 1
        assert net.resolved == ["a.example"]


@pytest.mark.lesson("L20")
@pytest.mark.parametrize("kind", ["image", "video"])
def test_url_in_text_of_a_file(kind: str) -> None:
    """Playlists and drawings name other files; none of them is a format that is read."""
    server = Server(reply())
    link = f"http://127.0.0.1:{server.port}/x"
    texts = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{link}.ts\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{link}'\n",
        f"<?xml version='1.0'?><MPD><BaseURL>{link}</BaseURL></MPD>",
        f"<svg xmlns='http://www.w3.org/2000/svg'><image href='{link}'/></svg>",
        f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video {server.port} RTP/AVP 96\r\n",
        f"%!PS-Adobe\n({link}) run\n",
    ]
    for text in texts:
        with pytest.raises(InputError):
            open_here(kind, io.BytesIO(text.encode()), LIMITS, kind)
    server.close()
    assert not server.asked


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """open/ is a root; secret.png beside it is not; links lead out and in."""
    (tmp_path / "open" / "deep").mkdir(parents=True)
    for name in ("secret.png", "open/a.png", "open/deep/b.png"):
        (tmp_path / name).write_bytes(encoded(noise()))
    (tmp_path / "opened").mkdir()
    (tmp_path / "opened/c.png").write_bytes(encoded(noise()))
    (tmp_path / "open/out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "open/up").symlink_to(tmp_path)
    (tmp_path / "open/gone").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "open/in.png").symlink_to(tmp_path / "open/deep/b.png")
    (tmp_path / "in").symlink_to(tmp_path / "open")
    return tmp_path


@pytest.mark.lesson("L21")
def test_local_files_under_roots_are_read(tree: Path) -> None:
    access = media_access([tree / "in"], [], local=False)  # a root may be a link itself
    assert access.roots == (tree / "open",)
    for name in ("open/a.png", "open/deep/b.png", "open/in.png", "in/a.png", "open/deep/../a.png"):
        for source in (f"{tree}/{name}", tree / name, f"file://{tree}/{name}"):
            assert picture_at(source, access).size
    assert picture_at(f"file://localhost{tree}/open/a.png", access).size


@pytest.mark.lesson("L21")
def test_local_files_elsewhere_are_rejected(tree: Path) -> None:
    """With one text, whether they are there or not, and without the roots' names."""
    access = media_access([tree / "open"], [], local=False)
    names = [
        "secret.png",
        "nothing.png",
        "open/../secret.png",
        "open/out.png",
        "open/up/secret.png",
    ]
    names += ["open/gone", "opened/c.png", "open/up/nothing.png", "open/deep/../../secret.png", ""]
    paths = [f"{tree}/{name}" for name in names]
    paths += ["/etc/passwd", "/proc/self/environ", "/proc/self/fd/0", "/dev/stdin", "../x", "", "/"]
    texts = set()
    for path in paths:
        for source in (path, f"file://{path}", f"file://{path}".replace(".", "%2e")):
            with pytest.raises(InputError, match="--allow-media-path") as refused:
                picture_at(source, access)
            texts.add(str(refused.value).rpartition(": ")[2])
    assert len(texts) == 1 and str(tree) not in texts.pop()


@pytest.mark.lesson("L21")
def test_local_files_nothing_is_opened_elsewhere(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = media_access([tree / "open"], [], local=False)

    def fail(*args: Any) -> int:
        raise AssertionError(args)

    monkeypatch.setattr(os, "open", fail)
    for name in ("secret.png", "open/out.png"):
        with pytest.raises(InputError, match="--allow-media-path"):
            picture_at(f"{tree}/{name}", access)


@pytest.mark.lesson("L21")
def test_local_files_a_link_swapped_in_does_not_win(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the opening, for the file and for a folder of its path."""
    access = media_access([tree / "open"], [], local=False)
    os_open = os.open
    swaps = [("open/a.png", "secret.png"), ("open/deep", "opened")]
    for (name, other), path in zip(swaps, ("open/a.png", "open/deep/c.png"), strict=True):
        (tree / "open/deep/c.png").write_bytes(b"x")

        def swapped(*args: Any, name: str = name, other: str = other) -> int:
            (tree / name).rename(tree / "open" / f"was-{other}")
            (tree / name).symlink_to(tree / other)
            return os_open(*args)

        before = len(open_files())
        monkeypatch.setattr(os, "open", swapped)
        with pytest.raises(InputError, match="--allow-media-path"):
            picture_at(f"{tree}/{path}", access)
        monkeypatch.undo()
        assert (tree / name).is_symlink() and len(open_files()) == before


@pytest.mark.lesson("L21")
@pytest.mark.parametrize("local", [True, False])
def test_local_files_must_be_regular(tree: Path, local: bool) -> None:
    """A FIFO without a writer does not block, here or when it is read."""
    access = media_access([] if local else [tree / "open"], [], local)
    os.mkfifo(tree / "open/fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "open/sock"))
        for name, words in (
            ("fifo", "not a regular"),
            ("deep", "directory"),
            ("sock", "No such dev"),
        ):
            before = len(open_files())
            with pytest.raises(InputError, match=words) as refused:
                picture_at(f"{tree}/open/{name}", access)
            assert refused.value.field == "image" and len(open_files()) == before
    if local:
        with pytest.raises(InputError, match="not a regular"):
            picture_at("/dev/zero", access)
    (tree / "open/empty").write_bytes(b"")
    with pytest.raises(InputError, match="no bytes"):
        picture_at(f"{tree}/open/empty", access)
    with pytest.raises(InputError, match="No such file"):
        picture_at(f"{tree}/open/nothing", access)


@pytest.mark.lesson("L21")
def test_local_files_no_roots_at_all(tree: Path) -> None:
    access = media_access([], [], local=False)
    assert access.roots == ()
    for source in (str(tree / "open/a.png"), f"file://{tree}/open/a.png", "/etc/passwd"):
        with pytest.raises(InputError, match=r"reading files .*--allow-media-path"):
            picture_at(source, access)


def test_other_schemes_are_named() -> None:
    for source in ("ftp://a.example/x", "s3://bucket/x", "FILES:///x"):
        with pytest.raises(InputError, match="only http://"):
            picture_at(source, MediaAccess(domains=("*",)))


def test_media_access_checks_what_it_is_given(tmp_path: Path) -> None:
    domains = ["A.Example", " *.b.example", "*", "8.8.8.8", "2606:2800:0::1", "[2606:2800::2]"]
    access = media_access([str(tmp_path)], domains, local=False)
    read = ("a.example", "*.b.example", "*", "8.8.8.8", "2606:2800::1", "2606:2800::2")
    assert access == MediaAccess((Path(os.path.realpath(tmp_path)),), read)
    assert media_access([], [], local=True) == MediaAccess(None)
    assert media_access([tmp_path], [], local=True).roots == access.roots
    wrong = ["http://a.example", "a.example/", "a.example:80", "a@b", "a..b", "a.*.b", "*a.b", "*."]
    wrong += ["**", ".a", "a.", "é.example", "127.1", "*.1.2", "", "a b", "*.8.8.8.8", "*.[::1]"]
    for domain in (*wrong, "[::1", "::1%eth0"):
        with pytest.raises(ConfigError, match="--allow-media-domains"):
            media_access([], [domain], local=False)
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "file", tmp_path / "nothing", "a\x00b"):
        with pytest.raises(ConfigError, match="--allow-media-path"):
            media_access([path], [], local=False)
