"""Fetch media over HTTP without giving access to the server's own network (SSRF protection).

Each URL, including those of redirects, is parsed once. Its host must be allowed and all its
addresses must be public; the connection goes to one of the checked addresses. Proxy settings of
the environment are ignored.
"""

from __future__ import annotations

import io
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from time import monotonic
from typing import BinaryIO, NoReturn, cast
from urllib.parse import urljoin

from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError
from urllib3.response import HTTPResponse

from ...config.media_limits import MediaLimits
from ...errors import InputError
from ..task import MediaTask
from .addresses import is_public
from .network import Network
from .urls import OTHER_WAY, Target, is_allowed, read_url, without_secrets

MAX_REDIRECTS = 5
MAX_DIALLED = 4  # addresses to try per host
DIAL_SECONDS = 10.0  # connection timeout per address
POLL_INTERVAL = 0.2  # seconds between two checks for cancellation
IN_MEMORY = 8 << 20  # bytes; larger bodies (mostly videos) are stored in an unnamed file
READ = 256 << 10  # bytes per read
REDIRECTS = (301, 302, 303, 307, 308)
FLAGS = "--allow-media-domains, LLM(allowed_media_domains=...)"


def fetch(
    url: str,
    domains: Sequence[str],
    field: str,
    task: MediaTask,
    network: Network | None = None,
) -> BinaryIO:
    """Fetch a URL and return its body as a file, which the caller closes.

    `domains`: see `is_allowed`; without any, all URLs are rejected. Raises `InputError` if the URL
    is not allowed, fetching fails or exceeds a limit, or `task` ends.
    """
    deadline = monotonic() + task.limits.fetch_timeout_s
    return _Fetch(url, tuple(domains), task, field, network or Network(), deadline).run()


@dataclass(frozen=True)
class _Fetch:
    url: str
    domains: tuple[str, ...]
    task: MediaTask
    field: str
    network: Network
    deadline: float  # for the whole fetch; time.monotonic()

    @property
    def limits(self) -> MediaLimits:
        return self.task.limits

    def run(self) -> BinaryIO:
        if not self.domains:
            raise self._error(f"fetching URLs is disabled (enable it with {FLAGS}); {OTHER_WAY}")
        target = self._read(self.url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._ask(target)
            if not isinstance(answer, str):
                return answer
            target = self._follow(target, answer)
        raise self._error(f"redirects more than {MAX_REDIRECTS} times")

    def _error(self, text: str) -> InputError:
        return InputError(self.field, f"{without_secrets(self.url)}: {text}")

    def _left(self) -> float:
        """Return the remaining seconds. Raises `InputError` if the time is up."""
        left = self.deadline - monotonic()
        if left <= 0:
            found = f"{without_secrets(self.url)}: fetching takes too many seconds"
            self.limits.refuse("fetch_timeout_s", self.field, found)
        return min(left, self.task.seconds_left(self.field))

    def _read(self, url: str, how: str = "") -> Target:
        """Parse a URL and check that its host is allowed; `how` is a prefix for errors."""
        try:
            target = read_url(url)
        except ValueError as error:
            raise self._error(f"{how}{error}") from None
        if not is_allowed(target.host, self.domains):
            raise self._error(
                f"{how}{target.place} is not an allowed domain (allow it with {FLAGS}); {OTHER_WAY}"
            )
        return target

    def _follow(self, target: Target, location: str) -> Target:
        """Return the target of a redirect; the joined URL is parsed and checked like any other."""
        try:
            url = urljoin(target.url, location)
        except ValueError:
            raise self._error("the redirect target is not a valid URL") from None
        after = self._read(url, "redirect target: ")
        if (target.scheme, after.scheme) == ("https", "http"):
            raise self._error("redirects from https to http")
        return after

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Convert network errors to `InputError`, without their texts."""
        try:
            yield
        except ssl.SSLCertVerificationError:
            raise self._error("the certificate is not valid for that host") from None
        except (OSError, HTTPException, HTTPError):
            self._left()
            raise self._error("the connection failed or was closed too early") from None

    def _addresses(self, target: Target) -> Sequence[str]:
        """Resolve a host; all its addresses must be public, since a resolver may alternate them.

        Unknown names and private addresses raise the same `InputError`, so that callers cannot
        discover names in the server's network.
        """
        found: Future[Sequence[str]] = Future()

        def work() -> None:
            try:
                found.set_result(self.network.resolve(target.host, target.port))
            except Exception as error:
                found.set_exception(error)

        # The resolver has no timeout. If it is late, its thread is abandoned and ends by itself.
        threading.Thread(target=work, daemon=True).start()
        while not found.done():
            wait([found], min(POLL_INTERVAL, self._left()))
        try:
            addresses = found.result()
        except (OSError, UnicodeError):
            addresses = ()
        self._left()
        if not addresses or not all(map(is_public, addresses)):
            raise self._error(f"{target.place} is unknown or not public; {OTHER_WAY}")
        return addresses

    def _dial(self, target: Target) -> socket.socket:
        addresses = self._addresses(target)[:MAX_DIALLED]
        for index, address in enumerate(addresses):
            with suppress(OSError):
                share = self._left() / (len(addresses) - index)
                return self.network.dial(address, target.port, min(share, DIAL_SECONDS))
        self._left()
        raise self._error(f"{target.place} does not answer")

    def _ask(self, target: Target) -> BinaryIO | str:
        """Request a target; return its body or the location of a redirect."""
        plain = self._dial(target)
        with closing(plain), _cut_off(plain, self._left(), self.task):
            with self._talking():
                sock = self._secure(plain, target)
            with closing(sock):
                return self._talk(sock, target)

    def _talk(self, sock: socket.socket, target: Target) -> BinaryIO | str:
        connection = HTTPConnection(target.host, target.port, timeout=self._left())
        connection.sock, connection.auto_open = sock, 0  # must not open its own connection
        headers = {"Host": target.netloc, "User-Agent": "octavo", "Accept": "*/*"}
        headers["Accept-Encoding"] = "identity"
        with closing(connection):
            with self._talking():
                connection.request(
                    "GET",
                    target.path,
                    headers=headers,
                    preload_content=False,
                    decode_content=False,
                )
                response = connection.getresponse()
            with closing(response):
                return self._take(response)

    def _secure(self, sock: socket.socket, target: Target) -> socket.socket:
        sock.settimeout(self._left())
        if target.scheme == "http":
            return sock
        return self.network.tls().wrap_socket(sock, server_hostname=target.host)

    def _take(self, response: HTTPResponse) -> BinaryIO | str:
        status, location = response.status, response.headers.get("location")
        if status in REDIRECTS and location:
            return location.encode("latin-1", "replace").decode("utf-8", "replace")
        if status != 200:
            raise self._error(f"the server returned HTTP status {status}; {OTHER_WAY}")
        self._check_head(response.headers)
        return self._body(response)

    def _check_head(self, headers: Mapping[str, str]) -> None:
        """Reject a compressed body and an invalid or too large Content-Length."""
        coding = headers.get("content-encoding", "identity").strip().lower()
        transfer = headers.get("transfer-encoding", "chunked").strip().lower()
        if coding not in ("", "identity") or transfer not in ("chunked", "identity"):
            text = "the server sent a compressed body despite Accept-Encoding: identity"
            raise self._error(f"{text}; {OTHER_WAY}")
        length = headers.get("content-length", "0").strip()
        if not (length.isascii() and length.isdecimal()):
            raise self._error("the server's Content-Length is not a number")
        if len(length) > 18 or int(length) > self.limits.max_media_bytes:
            self._too_large(f"{length[:18]}{'…' if len(length) > 18 else ''} bytes")

    def _too_large(self, found: str) -> NoReturn:
        found = f"{without_secrets(self.url)}: {found}"
        self.limits.refuse("max_media_bytes", self.field, found)

    def _body(self, response: HTTPResponse) -> BinaryIO:
        file: BinaryIO = io.BytesIO()
        count = 0
        try:
            while data := self._some(response):
                count += len(data)
                if count > self.limits.max_media_bytes:
                    self._too_large("too many bytes")
                if count > IN_MEMORY and isinstance(file, io.BytesIO):
                    file = _on_disk(file)
                file.write(data)
            if count == 0:
                raise self._error("has no bytes")
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def _some(self, response: HTTPResponse) -> bytes:
        """Read the next bytes of the body.

        Uses `read1`, because other methods load a whole chunk or an endless line into memory if the
        server sends one.
        """
        with self._talking():
            data = response.read1(READ)
        self._left()  # the end of data may come from `_cut_off`
        return data


def _on_disk(small: io.BytesIO) -> BinaryIO:
    """Copy the bytes to an unnamed temporary file, which is freed when it is closed."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    file.write(small.getbuffer())
    return file


@contextmanager
def _cut_off(sock: socket.socket, seconds: float, task: MediaTask) -> Iterator[None]:
    """Close a connection after `seconds` or when its task is cancelled.

    The socket's own timeout is not enough, because it restarts with each byte received.
    """
    watched = sock.dup()

    def cut() -> None:
        with suppress(OSError):
            watched.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        with task.watched(cut):
            yield
    finally:
        timer.cancel()
        timer.join()  # a late timer could shut down another socket with the same descriptor
        watched.close()
