"""The protocol's stubs: the committed ones are what protoc makes, and old protobuf loads them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.proto import grammar_pb2, media_pb2, octavo_pb2, octavo_pb2_grpc, worker_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
STUBS = sorted(p.name for p in PROTO.glob("*_pb2*"))


def test_names() -> None:
    assert octavo_pb2.DESCRIPTOR.name == "octavo/proto/octavo.proto"
    assert octavo_pb2.DESCRIPTOR.package == "octavo.v1"
    service = octavo_pb2.DESCRIPTOR.services_by_name["Inference"]
    assert [method.name for method in service.methods][:2] == ["Generate", "Abort"]
    assert hasattr(octavo_pb2_grpc, "InferenceStub")
    assert worker_pb2.DESCRIPTOR.package != "octavo.v1"


def test_the_generator_is_old_enough() -> None:
    """vLLM and Ray allow protobuf from 5 on: no run-time check of a newer one in the stubs."""
    for name in STUBS:
        text = (PROTO / name).read_text()
        assert "runtime_version" not in text
        assert not re.search(r"GRPC_GENERATED_VERSION", text)


def test_every_field_of_the_proto_is_in_the_stubs() -> None:
    """A quick check that a change of a .proto was followed by `make proto`."""
    for module in (grammar_pb2, media_pb2, octavo_pb2, worker_pb2):
        source = (ROOT / module.DESCRIPTOR.name.removeprefix("octavo/")).read_text()
        for message in module.DESCRIPTOR.message_types_by_name.values():
            assert f"message {message.name} " in source
            for field in message.fields:
                assert re.search(rf"\b{field.name} = {field.number};", source), field.full_name
        declared = len(re.findall(r"^message ", source, re.M))
        assert declared == len(module.DESCRIPTOR.message_types_by_name)


def test_committed_stubs_are_generated_ones(tmp_path: Path) -> None:
    command = ["make", "proto", f"OUT={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in STUBS:
        assert (tmp_path / "octavo/proto" / name).read_bytes() == (PROTO / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("protobuf", ["4.25.8", "5.29.5", "6.33.0"])
def test_stubs_load_with_older_protobuf(tmp_path: Path, protobuf: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "v")], check=True)
    python = str(tmp_path / "v/bin/python")
    install = [python, "-m", "pip", "install", "-q", f"protobuf=={protobuf}", "grpcio>=1.62"]
    subprocess.run(install, check=True)
    (tmp_path / "octavo").mkdir()
    (tmp_path / "octavo/__init__.py").touch()
    (tmp_path / "octavo/proto").symlink_to(PROTO)
    code = "from octavo.proto import octavo_pb2_grpc, worker_pb2_grpc"
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
