"""The client's channel, its TLS settings, and the conversion of gRPC errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ...proto import octavo_pb2 as pb
from ...scheduler.params import truncated_repr
from .errors import ClientError, invalid
from .media import MAX_MESSAGE_BYTES

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    # Do not share connections between clients. Otherwise, gRPC would reuse the parent's connection
    # in a forked process, and the first call would fail ("Wrong file descriptor generation").
    ("grpc.use_local_subchannel_pool", 1),
]


# Patterns in gRPC's connection errors, and the messages that replace them.
CONNECTION_ERRORS = (
    (
        "http1.x server",
        "this is the server's HTTP port; use its gRPC port, `grpc=` in the server's line "
        "`ready ...`",
    ),
    ("WRONG_VERSION_NUMBER", "the server does not use TLS; remove tls= (--tls-ca)"),
    (
        "certificate has expired|not yet valid",
        "the server's certificate has expired or is not valid yet; renew it",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server certificate is signed by an unknown CA; pass tls=octavo.Tls(ca=...) (--tls-ca)",
    ),
    (
        "Hostname Verification Check failed",
        "the server's certificate has another name than its address; set server_name of octavo.Tls",
    ),
    (
        "failed to connect.*: Socket closed",
        "the server closed the connection; it may require TLS (tls=, --tls-ca) or a client "
        "certificate (cert= and key= of octavo.Tls)",
    ),
)


@dataclass(frozen=True)
class Tls:
    """TLS settings: paths of PEM files.

    `cert` and `key`: the client's certificate, if the server requires one.
    """

    ca: str | Path | None = None  # CA of the server's certificate; None: the system's roots
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str = ""  # expected in the server's certificate; empty: the address's host


def open_channel(address: str, tls: Tls | bool) -> grpc.Channel:
    """Open a channel. `tls`: True trusts the system's root certificates.

    Raises `ClientError` for an invalid address or TLS files that cannot be read.
    """
    if address.startswith(("http://", "https://")):
        raise invalid(
            f"{truncated_repr(address)}: must be HOST:PORT, without http://; for TLS pass tls=True",
            "address",
        )
    if ":" not in address or address.endswith("]"):
        raise invalid(
            f"{truncated_repr(address)}: must be HOST:PORT; octavo serve's default port is 50051",
            "address",
        )
    if tls is False:
        return grpc.insecure_channel(address, options=OPTIONS)
    chosen = Tls() if tls is True else tls
    if not isinstance(chosen, Tls) or (chosen.cert is None) != (chosen.key is None):
        raise invalid("tls: must be True or octavo.Tls, with both cert and key or neither")
    ca, key, cert = (_read(path) for path in (chosen.ca, chosen.key, chosen.cert))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    name = chosen.server_name
    options = [*OPTIONS, ("grpc.ssl_target_name_override", name)] if name else OPTIONS
    return grpc.secure_channel(address, credentials, options=options)


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of each call. Raises `ClientError`, which does not contain the key."""
    if api_key is None:
        return ()
    if not isinstance(api_key, str) or not (api_key.isascii() and api_key.isprintable()):
        raise invalid("api_key: must be printable ASCII")
    return (("authorization", f"Bearer {api_key}"),)


def error_of(error: grpc.RpcError) -> ClientError:
    """Convert a gRPC error, using the status details if there are any."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        for words, text in CONNECTION_ERRORS:
            if re.search(words, error.details() or ""):
                return ClientError("UNAVAILABLE", text)
    retryable, field = None, ""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # malformed details, not from Octavo
        status = None
    for detail in status.details if status is not None else ():
        failure, bad = pb.Failure(), error_details_pb2.BadRequest()
        if detail.Unpack(failure):
            retryable = failure.retryable
        elif detail.Unpack(bad) and bad.field_violations:
            field = argument_of(bad.field_violations[0].field)
    return ClientError(error.code().name, error.details() or "", retryable, field)


def argument_of(field: str) -> str:
    """Return the Python argument for a field path of the request message."""
    return field.removeprefix("conversation.").removeprefix("sampling.")


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise invalid(f"tls: {path}: {error.strerror}") from None
