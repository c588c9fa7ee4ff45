"""What users rely on stays as it is: names, protocol, metrics, log keys, options, JSON bodies.

`python -P -m octavo.tests.packaging.test_public_surface` writes `tests/data/public_surface.json`.
Do so for an addition only; a removal needs an entry in CHANGELOG.md and one release of notice.
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click
import typer
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from prometheus_client.parser import text_string_to_metric_families

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Server, start
from octavo.engine.cli.main import app
from octavo.proto import octavo_pb2

STORED = Path(__file__).parents[1] / "data/public_surface.json"
COMMANDS = ("compare", "make_checkpoint", "eval_demo_model")
TEXT = [{"role": "user", "content": "Who are you?"}]
SHORT = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}
BY_TOKEN = ("choices[].logprobs.top_logprobs[]",)  # objects whose keys are tokens
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
REQUESTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "models": ("/v1/models", None),
    "health": ("/health", None),
    "snapshot": ("/engine/snapshot", None),
    "chat": ("/v1/chat/completions", {"messages": TEXT, **SHORT}),
    "chat log probabilities": (
        "/v1/chat/completions",
        {"messages": TEXT, "logprobs": True, "top_logprobs": 1, **SHORT},
    ),
    "chat with a tool": (
        "/v1/chat/completions",
        {"messages": TEXT, "tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    ),
    "chat stream": (
        "/v1/chat/completions",
        {"messages": TEXT, "stream": True, "stream_options": {"include_usage": True}, **SHORT},
    ),
    "completion": ("/v1/completions", {"prompt": "Hello", "logprobs": 1, **SHORT}),
    "completion stream": ("/v1/completions", {"prompt": "Hello", "stream": True, **SHORT}),
    "error": ("/v1/chat/completions", {"messages": TEXT, "top_p": 7}),
}


def surface() -> dict[str, Any]:
    """Return everything that is compared, as JSON values."""
    return {
        "exports": sorted(octavo.__all__),
        "protocol": _protocol(),
        "options": _options(typer.main.get_command(app)),
        **_served(),
    }


def _protocol() -> dict[str, Any]:
    described = FileDescriptorProto()
    octavo_pb2.DESCRIPTOR.CopyToProto(described)
    found: dict[str, Any] = {
        f"{service.name}.{method.name}": f"{method.input_type} -> {method.output_type}"
        for service in described.service
        for method in service.method
    }
    for enum in described.enum_type:
        found[enum.name] = {value.name: value.number for value in enum.value}
    for message in described.message_type:
        _add_message(message, message.name, found)
    return found


def _add_message(message: DescriptorProto, name: str, found: dict[str, Any]) -> None:
    found[name] = {
        field.name: f"{field.number} {field.type_name or field.type} {field.label}"
        for field in message.field
    }
    for enum in message.enum_type:
        found[f"{name}.{enum.name}"] = {value.name: value.number for value in enum.value}
    for nested in message.nested_type:
        _add_message(nested, f"{name}.{nested.name}", found)


def _options(command: click.Command, name: str = "octavo") -> dict[str, list[str]]:
    names = sorted(
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    )
    found = {name: names}
    if isinstance(command, click.Group):
        for each, child in command.commands.items():
            found |= _options(child, f"{name} {each}")
    return found


def _served() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ports = ("--http-port", "0", "--metrics-port", "0", "--log-format", "json")
        server = start(write_tiny_checkpoint(folder), *ports)
        try:
            bodies = {name: _body(server, *request) for name, request in REQUESTS.items()}
            with urllib.request.urlopen(f"http://{server.metrics}/metrics") as response:
                metrics = _metrics(response.read().decode())
            with octavo.Client(server.address) as client:
                bodies["server info settings"] = sorted(client.server_info().settings)
        finally:
            exit_code = server.end()
        logged = [json.loads(line) for line in server.text().splitlines()]
    request_lines = [line for line in logged if line["logger"] == "octavo.request"]
    return {
        "bodies": bodies,
        "metrics": metrics,
        "exit status after SIGTERM": exit_code,
        "log keys": sorted({key for line in logged for key in line}),
        "request log keys": sorted({key for line in request_lines for key in line}),
    }


def _body(server: Server, path: str, body: dict[str, Any] | None) -> list[str]:
    """Return the paths of all values in a response: `choices[].index: int`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://{server.http_address}{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        text = error.read().decode()
    chunks = re.findall(r"^data: (\{.*)$", text, re.MULTILINE) or [text or "null"]
    return sorted({path for chunk in chunks for path in _paths("", json.loads(chunk))})


def _paths(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [
            path
            for key, each in value.items()
            for path in _paths(f"{name}.{'*' if name in BY_TOKEN else key}".lstrip("."), each)
        ]
    if isinstance(value, list):
        return [path for each in value for path in _paths(f"{name}[]", each)] or [f"{name}[]"]
    return [f"{name}: {type(value).__name__}"]


def _metrics(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        labels: dict[str, set[str]] = {}
        for sample in family.samples:
            for key, value in sample.labels.items():
                labels.setdefault(key, set()).add(value)
        values = {key: sorted(each) for key, each in labels.items()}
        found[f"{family.name} ({family.type})"] = values
    return found


def test_nothing_that_users_rely_on_is_gone() -> None:
    """Compare with the stored surface: values may be added, none removed or changed."""
    _assert_within(json.loads(STORED.read_text()), json.loads(json.dumps(surface())), "")


def _assert_within(stored: Any, found: Any, where: str) -> None:
    if isinstance(stored, dict):
        for key, value in stored.items():
            assert key in found, f"{where}: {key} is gone"
            _assert_within(value, found[key], f"{where}: {key}")
    elif isinstance(stored, list):
        assert not set(stored) - set(found), f"{where}: {sorted(set(stored) - set(found))} are gone"
    else:
        assert stored == found, f"{where}: {stored} became {found}"


def test_documented_commands_exist() -> None:
    for name in COMMANDS:
        assert importlib.util.find_spec(f"octavo.benchmarks.{name}") is not None


if __name__ == "__main__":
    begun = time.monotonic()
    STORED.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n")
    print(f"{STORED}: written in {time.monotonic() - begun:.0f} s")
