"""Log lines as JSON, and the one line that tells of a request's end."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import start
from octavo.engine.errors import InputError
from octavo.engine.utils.logs import JsonFormatter, set_up_logs

SECRET = "swordfish"
PARAMS = octavo.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def formatted(message: str, *arguments: Any, **more: Any) -> dict[str, Any]:
    record = logging.getLogger("octavo.test").makeRecord(
        "octavo.test", logging.INFO, __file__, 1, message, arguments, **{"exc_info": None, **more}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return json.loads(line)


def test_a_line_is_an_object() -> None:
    line = formatted("two\nlines of %s", "“text”", extra={"request_id": "r-1", "odd": {1}})
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "octavo.test",
        "message": "two\nlines of “text”",
        "request_id": "r-1",
        "odd": "{1}",
    }


def test_exceptions_are_in_their_line() -> None:
    try:
        raise KeyError("gone")
    except KeyError as error:
        line = formatted("failed", exc_info=(KeyError, error, error.__traceback__))
    assert line["exception"].startswith("Traceback") and "KeyError: 'gone'" in line["exception"]


def test_another_format_is_rejected() -> None:
    with pytest.raises(ValueError, match="--log-format xml: must be text or json"):
        set_up_logs("xml")


@pytest.fixture(scope="module")
def engine() -> Iterator[octavo.AsyncLLM]:
    with octavo.AsyncLLM(dtype="float32", max_model_len=128) as engine:
        yield engine


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """Of requests' ends, as JSON; filled in as they come."""
    found: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(json.loads(JsonFormatter().format(record)))  # type: ignore[method-assign]
    logger = logging.getLogger("octavo.request")
    logger.addHandler(handler)
    caplog.set_level(logging.INFO, "octavo.request")
    yield found
    logger.removeHandler(handler)


def ask(engine: octavo.AsyncLLM, prompt: Any, most: int = 99, **more: Any) -> None:
    async def read() -> None:
        stream = engine.generate(prompt, **{"params": PARAMS, **more})
        async for _ in stream:
            most_left.pop()
            if not most_left:
                break
        await stream.aclose()

    most_left = [None] * most
    asyncio.run(read())


def test_a_requests_end_is_reported_once(
    engine: octavo.AsyncLLM, lines: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    ask(engine, f"{SECRET} of the sea", request_id="r-7")
    (line,) = lines
    assert (line["request_id"], line["level"], line["finish_reason"]) == ("r-7", "INFO", "length")
    assert line["output_tokens"] == 4 and line["prompt_tokens"] > 2 and line["cached_tokens"] == 0
    stages = [line[f"{stage}_s"] for stage in ("preprocess", "queue", "prefill", "decode")]
    assert sum(stages) == pytest.approx(line["total_s"], abs=1e-5)
    assert 0 < line["ttft_s"] < line["total_s"]
    assert "code" not in line and SECRET not in caplog.text + json.dumps(lines)


def test_however_it_ended(
    engine: octavo.AsyncLLM, lines: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError):
        ask(engine, {"messages": [{"role": SECRET, "content": SECRET}]})
    with pytest.raises(ValueError, match="max_model_len"):
        ask(engine, [f"{SECRET} " * 200][0])
    ask(engine, SECRET, timeout_s=0.0)
    ask(engine, SECRET, most=1)  # its reader leaves
    ask(engine, SECRET, most=4)  # its reader leaves once it is over
    with pytest.raises(TypeError):
        ask(engine, SECRET, wrong=1)
    ends = [(line["finish_reason"], line.get("code")) for line in lines]
    assert ends == [
        ("refused", "INVALID_ARGUMENT"),
        ("refused", "INVALID_ARGUMENT"),
        ("error", "DEADLINE_EXCEEDED"),
        ("abort", None),
        ("length", None),
        ("refused", "INVALID_ARGUMENT"),
    ]
    assert lines[0]["field"].startswith("messages[0]")
    assert lines[3]["output_tokens"] >= 1 and lines[3]["prompt_tokens"] > 0
    assert len({line["request_id"] for line in lines}) == len(lines)
    assert SECRET not in caplog.text + json.dumps(lines)


def test_a_servers_log_and_metrics(tmp_path: Path) -> None:
    """Every line of the log is an object, the workers' too; the metrics know of the request."""
    server = start(write_tiny_checkpoint(tmp_path), "--log-format", "json", "--metrics-port", "0")
    try:
        with octavo.Client(server.address) as client:
            message = {"role": "user", "content": SECRET}
            deltas = list(client.chat([message], temperature=0.0, max_tokens=3, ignore_eos=True))
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    finally:
        assert server.end() == 0
    assert 'octavo_requests_total{finish_reason="length"} 1.0' in text, "ours, not the warm-up"
    lines = [json.loads(line) for line in server.text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    (ours,) = [line for line in lines if line.get("request_id") == deltas[0].request_id]
    assert (ours["finish_reason"], ours["output_tokens"]) == ("length", 3)
    assert {"octavo.engine", "octavo.request"} <= {line["logger"] for line in lines}
    assert SECRET not in server.text()
