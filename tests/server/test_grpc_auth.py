"""Who may call: API keys, TLS, mutual TLS, and certificates that are replaced as it runs."""

from __future__ import annotations

import datetime
import hmac
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served, start, wait_for
from octavo.engine.client.errors import ClientError
from octavo.engine.errors import ConfigError
from octavo.engine.observability.rejection_log import API_KEY, LOG_INTERVAL, RejectionLog
from octavo.engine.server import api_keys as keys_module
from octavo.engine.server.api_keys import ApiKeys, read_keys
from octavo.engine.server.grpc_api import control
from octavo.engine.utils.tls import TlsFiles, read_tls
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True}
KEYS = ("first-key-0001", "second-key-0002", "third-key-0003")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    served = Served(
        checkpoint, dtype="float32", max_model_len=1024, kv_cache_memory_bytes=4_000_000
    )
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture(scope="module")
def guarded(served: Served) -> Iterator[str]:
    with served.another(ApiKeys(KEYS)) as address:
        yield address


def answer(client: octavo.Client) -> int:
    """How many tokens it gets. Raises ClientError."""
    return sum(len(delta.token_ids) for delta in client.generate("What is it?", **GREEDY))


def refused() -> Any:
    return pytest.raises(ClientError, match="UNAUTHENTICATED")


# API keys.


def every_method() -> list[str]:
    paths = [
        f"/{service.full_name}/{method.name}"
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    return [*paths, reflection, "/octavo.v1.Inference/Nothing", "/octavo.v2.Other/Generate"]


@pytest.mark.lesson("L28")
@pytest.mark.parametrize("path", every_method())
def test_key_timing_one_server_before_every_method(guarded: str, path: str) -> None:
    """Also before what is not there, so that nobody learns what is."""
    wrong = [(), (("authorization", "Bearer nobody's-key"),), (("authorization", KEYS[0]),)]
    wrong += [(("authorization", f"Basic {KEYS[0]}"),), (("x-api-key", KEYS[0]),)]
    wrong += [(("authorization", f"Bearer {KEYS[0][:-1]}"),), (("authorization", "Bearer "),)]
    with grpc.insecure_channel(guarded) as channel:
        for metadata in wrong:
            with pytest.raises(grpc.RpcError) as refused:
                list(channel.unary_stream(path)(b"\xff", metadata=metadata))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, metadata
            assert KEYS[0] not in (refused.value.details() or "")
        with pytest.raises(grpc.RpcError) as passed:
            key = (("authorization", f"Bearer {KEYS[1]}"),)
            list(channel.unary_stream(path)(b"\xff", metadata=key))
        codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        assert passed.value.code() in codes


@pytest.mark.lesson("L28")
def test_key_timing_all_keys_are_compared_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    class Counting:
        @staticmethod
        def compare_digest(one: bytes, other: bytes) -> bool:
            calls.append(len(one) * 1000 + len(other))
            return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys_module, "hmac", Counting)
    keys = ApiKeys(KEYS)
    for given, is_good in (
        (f"Bearer {KEYS[0]}", True),  # the first matches: the others are compared all the same
        (f"Bearer {KEYS[2]}", True),
        ("Bearer x", False),
        ("Bearer " + "x" * 100_000, False),
        (None, False),
        (KEYS[0], False),
    ):
        calls.clear()
        assert keys.accept(given) is is_good
        assert calls == [32032] * len(KEYS)  # digests: one length, whatever the key's


def test_health_is_open(guarded: str) -> None:
    with grpc.insecure_channel(guarded) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert next(stub.Watch(health_pb2.HealthCheckRequest())).status == reply.status


def test_a_name_like_health_s_is_not_open(guarded: str) -> None:
    with grpc.insecure_channel(guarded) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/grpc.health.v1.HealthOf/Check")(b"")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_client_with_each_key_and_without(guarded: str) -> None:
    for key in KEYS:
        with octavo.Client(guarded, api_key=key) as client:
            assert answer(client) == 3
            assert not client.abort("nobody")
    for key in (None, "nobody's-key"):
        with octavo.Client(guarded, api_key=key) as client:
            with pytest.raises(ClientError) as refused:
                answer(client)
            assert (refused.value.code, refused.value.retryable) == ("UNAUTHENTICATED", False)
            way_out = "Client(api_key=KEY), or OCTAVO_API_KEY=KEY for octavo chat"
            assert (way_out in str(refused.value)) == (key is None)
            with pytest.raises(ClientError, match="UNAUTHENTICATED"):
                client.abort("nobody")
    for wrong in ("a\nb", "ü", 5):
        with pytest.raises(ClientError, match="api_key"):
            octavo.Client(guarded, api_key=wrong)  # type: ignore[arg-type]


def test_calls_without_a_good_key_are_counted_and_logged(
    served: Served, guarded: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "octavo.server")
    with served.another(ApiKeys(KEYS)) as address:
        before = served.engine.engine.stats.errors["UNAUTHENTICATED"]
        for key in (None, *["a-wrong-key-0001"] * 4):
            with octavo.Client(address, api_key=key) as client, refused():
                client.load()
        with octavo.Client(address, api_key=KEYS[0]) as client:
            assert answer(client) == 3
        assert served.engine.engine.stats.errors["UNAUTHENTICATED"] == before + 5
    lines = [each.getMessage() for each in caplog.records if "API key" in each.getMessage()]
    assert len(lines) == 1 and "127.0.0.1" in lines[0], "one line for many calls"
    assert "a-wrong-key-0001" not in caplog.text and KEYS[0] not in caplog.text


def test_one_log_line_per_interval_counts_rejected_calls(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    stats = SimpleNamespace(count_error=lambda code: None)
    rejections = RejectionLog(stats, lambda: now)  # type: ignore[arg-type]
    for _ in range(50):
        rejections.add(API_KEY, "here")
    now += LOG_INTERVAL
    rejections.add(API_KEY, "there")
    lines = [each.getMessage() for each in caplog.records]
    assert ["rejected 1 call" in lines[0], "rejected 50 call" in lines[1], len(lines)] == [
        True,
        True,
        2,
    ]


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    both = read_keys(path, {"OCTAVO_API_KEYS": f"{KEYS[2]}, another-key-4"})
    assert both is not None
    assert all(both.accept(f"Bearer {key}") for key in (*KEYS, "another-key-4"))
    assert not both.accept("Bearer # ours") and not both.accept("Bearer ")
    for scheme in ("bearer ", "BEARER\t", "Bearer   ", " bearer \t "):  # RFC 9110
        assert both.accept(f"{scheme}{KEYS[0]}") and both.accept(f"{scheme}{KEYS[0]} "), scheme
    for wrong in (f"Bearer{KEYS[0]}", f"Basic {KEYS[0]}", KEYS[0], f"Bearer {KEYS[0]} x", "bearer"):
        assert not both.accept(wrong), wrong
    assert read_keys(None, {}) is None
    alone = read_keys(None, {"OCTAVO_API_KEYS": KEYS[0]})
    assert alone is not None and alone.accept(f"Bearer {KEYS[0]}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        ("short\n", "8 or more ASCII"),
        ("with a space in it\n", "without spaces"),
        ("schlüssel-0001\n", "ASCII"),
        (None, "cannot read"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, content: str | None, words: str) -> None:
    """An operator who asked for keys never gets an open server; no key is told."""
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as told:
        read_keys(path, {})
    text = str(told.value).replace(str(path), "")
    assert all(line not in text for line in (content or "").splitlines())
    with pytest.raises(ConfigError):
        read_keys(None, {"OCTAVO_API_KEYS": " , "})
    with pytest.raises(
        ConfigError, match=r"^OCTAVO_API_KEYS: each key must"
    ):  # not the file's fault
        path.write_text(KEYS[0])
        read_keys(path, {"OCTAVO_API_KEYS": "short"})


def test_a_key_file_that_changes_is_read_again(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "octavo.server")
    path = tmp_path / "keys"
    path.write_text(f"{KEYS[0]}\n")
    keys = read_keys(path, {"OCTAVO_API_KEYS": "of-the-environment"})

    def good() -> list[str]:
        found = []
        for key in (*KEYS, "of-the-environment"):
            with octavo.Client(address, api_key=key) as client, suppress(ClientError):
                client.load()
                found.append(key)
        return found

    with served.another(keys) as address:
        assert good() == [KEYS[0], "of-the-environment"]
        path.write_text(f"{KEYS[1]}\n{KEYS[2]}\n")
        assert good() == [KEYS[1], KEYS[2], "of-the-environment"]
        for break_it in (lambda: path.write_text("short\n"), path.unlink):
            break_it()
            assert good() == [KEYS[1], KEYS[2], "of-the-environment"], "the last good ones stay"
        other = tmp_path / "other"
        other.write_text(f"{KEYS[0]}\n")
        os.replace(other, path)
        assert good() == [KEYS[0], "of-the-environment"]
    told = [each.levelname for each in caplog.records if "key file" in each.getMessage()]
    assert told == ["INFO", "WARNING", "WARNING", "INFO"], "each change once"
    assert not any(key in caplog.text for key in (*KEYS, "short"))


def test_a_key_file_that_is_emptied_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(KEYS[0])
    keys = read_keys(path, {})
    path.write_text("")
    assert keys is not None and keys.accept(f"Bearer {KEYS[0]}") and not keys.accept(None)


# TLS.


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, also as files."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    cert_file: Path
    key_file: Path


def make_pair(folder: Path, name: str, signer: Pair | None = None) -> Pair:
    """A CA where nobody signs it; else a certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if signer is None else signer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key if signer is None else signer.key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(pem))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files[1].write_bytes(key.private_bytes(pem, *plain))
    return Pair(certificate, key, *files)


@dataclass(frozen=True)
class Certificates:
    folder: Path
    ca: Pair
    server: Pair
    client: Pair
    stranger: Pair  # signed by nobody that is trusted

    @property
    def client_files(self) -> tuple[Path, Path]:
        """Its key and its certificate."""
        return self.client.key_file, self.client.cert_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    ca = make_pair(folder, "ca")
    other = make_pair(folder, "other")
    pairs = [make_pair(folder, name, ca) for name in ("server", "client")]
    return Certificates(folder, ca, *pairs, make_pair(folder, "stranger", other))


def fails(address: str, tls: octavo.Tls | bool, words: str) -> None:
    """The way out is told, and not OpenSSL's names."""
    with octavo.Client(address, tls=tls) as client, pytest.raises(ClientError) as refused:
        answer(client)
    assert refused.value.code == "UNAVAILABLE"
    assert words in refused.value.text and "OPENSSL" not in refused.value.text


def test_tls(served: Served, made: Certificates) -> None:
    trusting = octavo.Tls(ca=made.ca.cert_file)
    with served.another(tls=TlsFiles(made.server.cert_file, made.server.key_file)) as address:
        with octavo.Client(address, tls=trusting) as client:
            assert answer(client) == 3
        fails(address, False, "may require TLS")
        fails(address, True, "Tls(ca=...)")  # this machine trusts no such CA
        fails(address, octavo.Tls(ca=made.folder / "other.pem"), "Tls(ca=...)")
        elsewhere = octavo.Tls(ca=made.ca.cert_file, server_name="elsewhere.example")
        fails(address, elsewhere, "server_name of")
    fails(served.address, trusting, "does not use TLS")


def test_mutual_tls_beside_keys(served: Served, made: Certificates) -> None:
    files = TlsFiles(made.server.cert_file, made.server.key_file, made.ca.cert_file)
    ca, own, stranger = made.ca.cert_file, made.client, made.stranger
    known = octavo.Tls(ca=ca, cert=own.cert_file, key=own.key_file)
    with served.another(ApiKeys(KEYS), files) as address:
        with octavo.Client(address, tls=known, api_key=KEYS[0]) as client:
            assert answer(client) == 3
        with octavo.Client(address, tls=known) as client, refused():
            answer(client)
        fails(address, octavo.Tls(ca=ca), "cert= and key=")
        strange = octavo.Tls(ca=ca, cert=stranger.cert_file, key=stranger.key_file)
        fails(address, strange, "a client certificate")


@pytest.mark.parametrize("with_ca", [True, False])
def test_a_certificate_is_as_good_as_a_key_to_drain(
    served: Served, made: Certificates, monkeypatch: pytest.MonkeyPatch, with_ca: bool
) -> None:
    """On this machine all may, so as if it were another."""
    monkeypatch.setattr(control, "HERE", ("elsewhere",))
    client_ca = made.ca.cert_file if with_ca else None
    files = TlsFiles(made.server.cert_file, made.server.key_file, client_ca)
    read = (path.read_bytes() for path in (made.ca.cert_file, *made.client_files))
    credentials = grpc.ssl_channel_credentials(*read)
    with served.another(tls=files) as address, grpc.secure_channel(address, credentials) as channel:
        drain = octavo_pb2_grpc.ControlStub(channel).Drain
        if with_ca:
            assert drain(pb.DrainRequest()).num_running == 0
            return
        with pytest.raises(grpc.RpcError) as denied:
            drain(pb.DrainRequest())
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_the_client_s_files(made: Certificates) -> None:
    with pytest.raises(ClientError, match="/no/such"):
        octavo.Client(tls=octavo.Tls(ca="/no/such"))
    for wrong in (octavo.Tls(cert=made.client.cert_file), "yes"):
        with pytest.raises(ClientError, match="tls: must be"):
            octavo.Client(tls=wrong)  # type: ignore[arg-type]


def presented(address: str, ca: Path) -> int:
    """The serial number of the certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    plain = socket.create_connection((host, int(port)), 10)
    with context.wrap_socket(plain) as wrapped:
        data = wrapped.getpeercert(binary_form=True)
    assert data is not None
    return x509.load_der_x509_certificate(data).serial_number


def test_certificates_are_reloaded_and_broken_ones_are_not(
    served: Served, made: Certificates, tmp_path: Path
) -> None:
    old = make_pair(tmp_path, "server", made.ca)
    trusting = octavo.Tls(ca=made.ca.cert_file)
    with served.another(tls=TlsFiles(old.cert_file, old.key_file)) as address:
        with octavo.Client(address, tls=trusting) as before:
            assert answer(before) == 3
            assert presented(address, made.ca.cert_file) == old.certificate.serial_number
            fresh = make_pair(tmp_path, "server", made.ca)
            wait_for(
                lambda: presented(address, made.ca.cert_file) == fresh.certificate.serial_number
            )
            assert answer(before) == 3  # a connection that stands goes on
        for spoil in (b"junk", made.client.key_file.read_bytes()):  # torn, and of another pair
            old.key_file.write_bytes(spoil)
            assert presented(address, made.ca.cert_file) == fresh.certificate.serial_number
        old.key_file.unlink()
        with octavo.Client(address, tls=trusting) as after:
            assert answer(after) == 3


def test_tls_files_that_cannot_be(made: Certificates, tmp_path: Path) -> None:
    cert, key = made.server.cert_file, made.server.key_file
    assert read_tls(None, None, None) is None
    for given in ((cert, None, None), (None, key, None), (None, None, cert)):
        with pytest.raises(ConfigError, match="pass both"):
            read_tls(*given)
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for given in (
        (junk, key, None),
        (cert, junk, None),
        (cert, made.client.key_file, None),
        (cert, key, junk),
        (cert, tmp_path / "nothing", None),
    ):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_tls(*given)


def test_octavo_serve_with_all_of_it(
    checkpoint: Path, made: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_API_KEYS", KEYS[1])
    path = tmp_path / "keys"
    path.write_text(KEYS[0])
    options = ["--api-key-file", path, "--tls-cert", made.server.cert_file]
    options += ["--tls-key", made.server.key_file, "--tls-client-ca", made.ca.cert_file]
    server = start(checkpoint, *map(str, options))
    own = made.client
    tls = octavo.Tls(ca=made.ca.cert_file, cert=own.cert_file, key=own.key_file)
    for key in KEYS[:2]:
        with octavo.Client(server.address, api_key=key, tls=tls) as client:
            assert answer(client) == 3
    with octavo.Client(server.address, api_key=KEYS[2], tls=tls) as client, refused():
        answer(client)
    for pid in server.worker_pids:  # keys are the front end's alone
        assert KEYS[1].encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert server.end() == 0
    assert not any(key in server.text() for key in KEYS)
