"""A client on Node, as its users have it: @grpc/grpc-js and @grpc/proto-loader, from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2

from octavo.benchmarks.eval_demo_model import ask_color
from octavo.benchmarks.fakes.tiny_server import Served
from octavo.engine.config.engine_config import EMBEDDED_MODEL
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.utils.tls import TlsFiles

from .test_grpc_auth import make_pair

HERE = Path(__file__).resolve().parents[1]
FILES = ("package.json", "package-lock.json", "client.js")
OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH")
KEY = "a-key-of-node-0001"
OK, CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, UNAVAILABLE, UNAUTHENTICATED = (
    0,
    1,
    3,
    4,
    14,
    16,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client with its packages."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine")
    folder = tmp_path_factory.mktemp("node")
    for name in FILES:
        shutil.copy(HERE / "node_client" / name, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if any(word in done.stderr for word in OFFLINE):
        pytest.skip("npm reaches no registry")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served(
        EMBEDDED_MODEL, dtype="float32", max_model_len=1024, kv_cache_memory_bytes=8_000_000
    )
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture(scope="module")
def question() -> Any:
    return ask_color(np.random.default_rng(5))


@pytest.fixture(scope="module")
def found(folder: Path, served: Served, question: Any) -> Found:
    """What the client saw."""
    ca = make_pair(folder, "ca")
    pair = make_pair(folder, "server", ca)
    described = descriptor_pb2.FileDescriptorSet()
    health_pb2.DESCRIPTOR.CopyToProto(described.file.add())
    (folder / "health.bin").write_bytes(described.SerializeToString())
    image, text = question.messages[0]["content"]
    image["image"].save(folder / "image.png")
    tls = TlsFiles(pair.cert_file, pair.key_file)
    keys = ApiKeys((KEY,))
    with served.another(keys) as guarded, served.another(keys, tls) as secure:
        given = {
            "proto": str(HERE.parent / "proto/octavo.proto"),
            "health": "health.bin",
            "address": served.address,
            "guarded": guarded,
            "secure": secure,
            "key": KEY,
            "ca": str(ca.cert_file),
            "image": "image.png",
            "question": text["text"],
        }
        command = ["node", "client.js", json.dumps(given)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_image_is_answered_as_a_stream_and_at_once(found: Found, question: Any) -> None:
    stream, once = found["stream"], found["once"]
    assert (stream["code"], once["code"]) == (OK, OK)
    assert stream["text"] == once["reply"]["answers"][0]["text"] == question.answer
    assert stream["num_deltas"] > 1
    assert stream["num_tokens"] == stream["usage"]["output_tokens"]
    assert stream["usage"]["prompt_tokens"] == once["reply"]["usage"]["prompt_tokens"]
    assert stream["finish_reason"] == "FINISH_REASON_STOP"
    (media,) = stream["media"]
    assert media["kind"] == "MEDIA_KIND_IMAGE" and media["num_tokens"] > 0


def test_cancel_and_deadline(found: Found, served: Served) -> None:
    assert found["cancel"]["code"] == CANCELLED and 1 <= found["cancel"]["num_deltas"] < 900
    assert found["deadline"]["code"] == DEADLINE_EXCEEDED
    served.wait_empty()


def test_a_hundred_streams_at_once(found: Found) -> None:
    answers: dict[str, list[int]] = {}
    for text, code, token_ids in found["many"]:
        assert code == OK
        assert token_ids == answers.setdefault(text, token_ids) and len(token_ids) == 8
    assert len(found["many"]) == 100 and len(answers) == 7


@pytest.mark.parametrize(("case", "field"), [("wrong", "temperature"), ("zero", "max_tokens")])
def test_what_is_rejected(found: Found, case: str, field: str) -> None:
    """A zero that is set is told from a field that is not: proto-loader sends it."""
    assert found[case]["code"] == INVALID_ARGUMENT and field in found[case]["details"]


def test_health(found: Found) -> None:
    assert found["health"]["code"] == OK and found["health"]["reply"]["status"] == "SERVING"


def test_keys_and_tls(found: Found) -> None:
    codes = {name: found[name]["code"] for name in ("key", "tls", "no_key", "tls_no_key")}
    assert codes == {
        "key": OK,
        "tls": OK,
        "no_key": UNAUTHENTICATED,
        "tls_no_key": UNAUTHENTICATED,
    }
    assert found["unknown_ca"]["code"] == UNAVAILABLE
