"""TLS and mutual TLS, with certificates that may be replaced while the server runs."""

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
    """PEM files. With `client_ca`, whoever calls must have a certificate that it signed."""

    cert: Path  # the server's, and those between it and the root
    key: Path
    client_ca: Path | None = None

    def read(self) -> tuple[bytes, ...]:
        """Their bytes. Raises `ConfigError` where they are none that could serve."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password=lambda: b"")
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
            return tuple(path.read_bytes() for path in self._paths())
        except (OSError, ssl.SSLError):
            names = ", ".join(map(str, self._paths()))
            text = "cannot be read, or are no certificate, its key and a CA, as PEM"
            raise ConfigError(f"{names}: {text}") from None

    def stamps(self) -> list[tuple[int, int]]:
        """What changes when a file does. Raises OSError."""
        found = [path.stat() for path in self._paths()]
        return [(each.st_mtime_ns, each.st_ino) for each in found]

    def _paths(self) -> list[Path]:
        return [path for path in (self.cert, self.key, self.client_ca) if path is not None]


def read_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """None where none is given. Raises `ConfigError`."""
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ConfigError("--tls-cert and --tls-key: give both; --tls-client-ca comes beside them")
    files = TlsFiles(cert, key, client_ca)
    files.read()
    return files


def group_tls(folder: str | Path) -> TlsFiles:
    """A group's, engine's or worker's, by the names that Kubernetes' secrets have. Raises
    `ConfigError`."""
    folder = Path(folder)
    files = TlsFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    files.read()
    return files


class Reloading:
    """Certificates by the files' latest state. One that cannot be read, perhaps because it is
    being written, changes nothing: the last good ones stay."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamps = files.stamps()
        self.first = self._configuration()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC at each handshake. None: as before."""
        try:
            stamps = self._files.stamps()
            if stamps == self._stamps:
                return None
            fresh = self._configuration()
        except (OSError, ConfigError):
            log.warning("the TLS files have changed and cannot be used; the former ones stay")
            return None
        self._stamps = stamps
        log.info("the TLS files have changed and are used from now on")
        return fresh

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key, *client_ca = self._files.read()
        return grpc.ssl_server_certificate_configuration([(key, cert)], *client_ca)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Raises `ConfigError`."""
    reloading = Reloading(files)
    return grpc.dynamic_ssl_server_credentials(
        reloading.first, reloading, require_client_authentication=files.client_ca is not None
    )
