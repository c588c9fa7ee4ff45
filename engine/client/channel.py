"""How the client reaches a server, and what a failed call says."""

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
    # A client shares no connection with another: in a forked process gRPC would otherwise reuse the
    # parent's, and the first call would fail ("Wrong file descriptor generation").
    ("grpc.use_local_subchannel_pool", 1),
]


# What gRPC says where it met something else than it came for, and what that means here.
MET = (
    (
        "http1.x server",
        "there is a server, and it speaks HTTP: give the port of gRPC, which is `grpc=` in the "
        "server's line `ready ...`",
    ),
    ("WRONG_VERSION_NUMBER", "the server speaks no TLS: leave tls= (--tls-ca) out"),
    ("certificate has expired|not yet valid", "the server's certificate is not valid now"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "who signed the server's certificate is not known here: tls=octavo.Tls(ca=...) (--tls-ca)",
    ),
    (
        "Hostname Verification Check failed",
        "the server's certificate is for another name than its address: server_name= of octavo.Tls",
    ),
    (
        "failed to connect.*: Socket closed",
        "the server closed the connection: it may want TLS (tls=, --tls-ca), or a certificate that "
        "it knows (cert= and key= of octavo.Tls)",
    ),
)


@dataclass(frozen=True)
class Tls:
    """How to talk TLS: PEM files. `cert` and `key` are the client's own, where the server asks
    for one."""

    ca: str | Path | None = None  # who signed the server's certificate; None: this machine's roots
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str = ""  # in its certificate; empty: the address's


def open_channel(address: str, tls: Tls | bool) -> grpc.Channel:
    """`tls`: True trusts this machine's roots. Raises `ClientError` for files that cannot be
    read."""
    if address.startswith(("http://", "https://")):
        raise invalid(
            f"{truncated_repr(address)}: must be HOST:PORT of gRPC; TLS is tls=True", "address"
        )
    if ":" not in address or address.endswith("]"):
        raise invalid(
            f"{truncated_repr(address)}: must be HOST:PORT; 50051 is the port of octavo serve",
            "address",
        )
    if tls is False:
        return grpc.insecure_channel(address, options=OPTIONS)
    chosen = Tls() if tls is True else tls
    if not isinstance(chosen, Tls) or (chosen.cert is None) != (chosen.key is None):
        raise invalid("tls: must be True or octavo.Tls, with cert and key or with neither")
    ca, key, cert = (_read(path) for path in (chosen.ca, chosen.key, chosen.cert))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    name = chosen.server_name
    options = [*OPTIONS, ("grpc.ssl_target_name_override", name)] if name else OPTIONS
    return grpc.secure_channel(address, credentials, options=options)


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What each call carries. Raises `ClientError`, which does not tell the key."""
    if api_key is None:
        return ()
    if not isinstance(api_key, str) or not (api_key.isascii() and api_key.isprintable()):
        raise invalid("api_key: must be a text of plain characters")
    return (("authorization", f"Bearer {api_key}"),)


def error_of(error: grpc.RpcError) -> ClientError:
    """By the status's details, where it has any."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        for words, text in MET:
            if re.search(words, error.details() or ""):
                return ClientError("UNAVAILABLE", text)
    retryable, field = None, ""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # of another server's
        status = None
    for detail in status.details if status is not None else ():
        failure, bad = pb.Failure(), error_details_pb2.BadRequest()
        if detail.Unpack(failure):
            retryable = failure.retryable
        elif detail.Unpack(bad) and bad.field_violations:
            field = argument_of(bad.field_violations[0].field)
    return ClientError(error.code().name, error.details() or "", retryable, field)


def argument_of(field: str) -> str:
    """A field of the request's message by its name as an argument, which has no such levels."""
    return field.removeprefix("conversation.").removeprefix("sampling.")


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise invalid(f"tls: {path}: {error.strerror}") from None
