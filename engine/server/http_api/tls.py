"""TLS of the HTTP server, with the same files as gRPC."""

from __future__ import annotations

import logging
import ssl

from ...errors import ConfigError
from ...utils.tls import TlsFiles

log = logging.getLogger("octavo.server")


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a TLS context that reloads the files when they change.

    If a reload fails, the previous certificates stay in use. Raises `ConfigError` or OSError.
    """
    outer, latest, stamps = _context(files), _context(files), files.stamps()

    def renew(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Reload changed files. OpenSSL calls this in each handshake."""
        nonlocal latest, stamps
        try:
            found = files.stamps()
            if found != stamps:
                latest, stamps = _context(files), found
        except (OSError, ConfigError):
            log.warning("cannot reload the changed TLS files; the previous ones stay in use")
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
