"""TLS of the HTTP door, by the files that gRPC's takes."""

from __future__ import annotations

import logging
import ssl

from ...errors import ConfigError
from ...utils.tls import TlsFiles

log = logging.getLogger("octavo.server")


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """A context whose handshakes are made with the files' latest state; what cannot be read
    changes nothing. Raises `ConfigError` or OSError."""
    outer, latest, stamps = _context(files), _context(files), files.stamps()

    def renew(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Asked by OpenSSL at each handshake."""
        nonlocal latest, stamps
        try:
            found = files.stamps()
            if found != stamps:
                latest, stamps = _context(files), found
        except (OSError, ConfigError):
            log.warning("the TLS files have changed and cannot be used; the former ones stay")
        connection.context = latest

    outer.sni_callback = renew
    return outer


def _context(files: TlsFiles) -> ssl.SSLContext:
    files.read()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
