"""Media from the web, without a way into the network that the server stands in.

Each URL, a redirect's too, is read once; its host must be on the list, and all its addresses must
be public; one of these very addresses is dialled. Proxies of the environment have no part in it.
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
MAX_DIALLED = 4  # addresses of one host
DIAL_SECONDS = 10.0  # that one of them may take
POLL_INTERVAL = 0.2  # seconds between two looks at whether the task goes on
IN_MEMORY = 8 << 20  # bytes: what is larger, videos mostly, waits in a file without a name
READ = 256 << 10  # bytes at a time
REDIRECTS = (301, 302, 303, 307, 308)
FLAGS = "--allow-media-domains, LLM(allowed_media_domains=...)"


def fetch(
    url: str,
    domains: Sequence[str],
    field: str,
    task: MediaTask,
    network: Network | None = None,
) -> BinaryIO:
    """What a URL has, to be closed by the caller. Raises `InputError`, also when `task` ends.

    `domains`: hosts, "*.example.com" for all below, "*" for all; none: nothing is fetched.
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
    deadline: float  # of all that is done for this URL

    @property
    def limits(self) -> MediaLimits:
        return self.task.limits

    def run(self) -> BinaryIO:
        if not self.domains:
            raise self._error(f"URLs are not fetched here ({FLAGS} allow it); {OTHER_WAY}")
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
        """Seconds. Raises `InputError` when there are none."""
        left = self.deadline - monotonic()
        if left <= 0:
            found = f"{without_secrets(self.url)}: takes more seconds"
            self.limits.refuse("fetch_timeout_s", self.field, found)
        return min(left, self.task.seconds_left(self.field))

    def _read(self, url: str, how: str = "") -> Target:
        """Where a URL leads, if that is allowed."""
        try:
            target = read_url(url)
        except ValueError as error:
            raise self._error(f"{how}{error}") from None
        if not is_allowed(target.host, self.domains):
            raise self._error(
                f"{how}{target.place} is not among the domains that are fetched from ({FLAGS}); "
                f"{OTHER_WAY}"
            )
        return target

    def _follow(self, target: Target, location: str) -> Target:
        """Where a redirect leads, by the rule for any URL. Joining decides nothing: what comes of
        it is read anew."""
        try:
            url = urljoin(target.url, location)
        except ValueError:
            raise self._error("redirects to what is no URL") from None
        after = self._read(url, "redirects, and there: ")
        if (target.scheme, after.scheme) == ("https", "http"):
            raise self._error("redirects from https to http")
        return after

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Network errors become the caller's, without their texts."""
        try:
            yield
        except ssl.SSLCertVerificationError:
            raise self._error("the certificate is not valid for that host") from None
        except (OSError, HTTPException, HTTPError):
            self._left()
            raise self._error("the connection failed, or broke too early") from None

    def _addresses(self, target: Target) -> Sequence[str]:
        """Checked: one that is not public rules out all, since a name may turn between them.

        No such name and no public address are told apart by nobody who asks: names of the
        server's own network are not to be found out.
        """
        found: Future[Sequence[str]] = Future()

        def work() -> None:
            try:
                found.set_result(self.network.resolve(target.host, target.port))
            except Exception as error:
                found.set_exception(error)

        # A resolver takes no timeout: where it is late, its thread is left to end by itself.
        threading.Thread(target=work, daemon=True).start()
        while not found.done():
            wait([found], min(POLL_INTERVAL, self._left()))
        try:
            addresses = found.result()
        except (OSError, UnicodeError):
            addresses = ()
        self._left()
        if not addresses or not all(map(is_public, addresses)):
            raise self._error(f"{target.place} is not known, or not public; {OTHER_WAY}")
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
        """What a target has, or where it redirects to."""
        plain = self._dial(target)
        with closing(plain), _cut_off(plain, self._left(), self.task):
            with self._talking():
                sock = self._secure(plain, target)
            with closing(sock):
                return self._talk(sock, target)

    def _talk(self, sock: socket.socket, target: Target) -> BinaryIO | str:
        connection = HTTPConnection(target.host, target.port, timeout=self._left())
        connection.sock, connection.auto_open = sock, 0  # never dials by itself
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
            raise self._error(f"the server answered with status {status}; {OTHER_WAY}")
        self._check_head(response.headers)
        return self._body(response)

    def _check_head(self, headers: Mapping[str, str]) -> None:
        """Bytes come as they are, and a length is one."""
        coding = headers.get("content-encoding", "identity").strip().lower()
        transfer = headers.get("transfer-encoding", "chunked").strip().lower()
        if coding not in ("", "identity") or transfer not in ("chunked", "identity"):
            raise self._error(f"the server sends it packed, which it was asked not to; {OTHER_WAY}")
        length = headers.get("content-length", "0").strip()
        if not (length.isascii() and length.isdecimal()):
            raise self._error("the server's Content-Length is no number")
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
                    self._too_large("more bytes than that")
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
        """The body's next bytes. `read1`: the other ways take a chunk's whole size, or a line
        without an end, into memory, if the server says so."""
        with self._talking():
            data = response.read1(READ)
        self._left()  # a connection that was cut off looks like one that ended well
        return data


def _on_disk(small: io.BytesIO) -> BinaryIO:
    """Without a name in any folder; the system frees it when it is closed."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    file.write(small.getbuffer())
    return file


@contextmanager
def _cut_off(sock: socket.socket, seconds: float, task: MediaTask) -> Iterator[None]:
    """Ends a connection after that time or with its task, whatever goes on there: a socket's own
    timeout begins anew with each byte that comes."""
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
        timer.join()  # so that it never meets another socket under this number
        watched.close()
