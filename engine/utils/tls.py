"""TLS and mutual TLS, with certificates that can be replaced while the server is running."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..errors import ConfigError

log = logging.getLogger("octavo.server")


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a server."""

    cert: Path  # server certificate with its intermediate certificates
    key: Path
    client_ca: Path | None = None  # clients need a certificate signed by this CA

    def read(self) -> tuple[bytes, ...]:
        """Validate the files and return their contents. Raises `ConfigError`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password=lambda: b"")
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
            return tuple(path.read_bytes() for path in self._paths())
        except (OSError, ssl.SSLError):
            names = ", ".join(map(str, self._paths()))
            text = "cannot be read, or are not a valid certificate, its key and a CA in PEM format"
            raise ConfigError(f"{names}: {text}") from None

    def stamps(self) -> list[tuple[int, int]]:
        """Return (mtime, inode) of each file, to detect changes. Raises OSError."""
        found = [path.stat() for path in self._paths()]
        return [(each.st_mtime_ns, each.st_ino) for each in found]

    def _paths(self) -> list[Path]:
        return [path for path in (self.cert, self.key, self.client_ca) if path is not None]


def read_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """Return the validated TLS files; None if no path is given. Raises `ConfigError`."""
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ConfigError("--tls-cert and --tls-key: pass both; --tls-client-ca requires them")
    files = TlsFiles(cert, key, client_ca)
    files.read()
    return files


def group_tls(folder: str | Path) -> TlsFiles:
    """Return the mutual TLS files of an engine or a worker. Raises `ConfigError`.

    The file names are those of Kubernetes TLS secrets.
    """
    folder = Path(folder)
    files = TlsFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    files.read()
    return files


class Reloading:
    """Certificate fetcher for gRPC that reloads changed files.

    If new files cannot be read, such as while they are being written, the old certificates stay.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamps = files.stamps()
        self.first = self._configuration()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return changed certificates, else None. gRPC calls this at each handshake."""
        try:
            stamps = self._files.stamps()
            if stamps == self._stamps:
                return None
            fresh = self._configuration()
        except (OSError, ConfigError):
            log.warning("the TLS files changed but are invalid; keeping the previous certificates")
            return None
        self._stamps = stamps
        log.info("reloaded the changed TLS files")
        return fresh

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key, *client_ca = self._files.read()
        return grpc.ssl_server_certificate_configuration([(key, cert)], *client_ca)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return gRPC server credentials that reload changed files. Raises `ConfigError`."""
    reloading = Reloading(files)
    return grpc.dynamic_ssl_server_credentials(
        reloading.first, reloading, require_client_authentication=files.client_ca is not None
    )
