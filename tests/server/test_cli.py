"""The command line: help, user errors in one line, JSON output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import octavo as octavo_package
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.cli.info import checkpoint_info
from octavo.engine.cli.main import app


def octavo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: a new process spends two seconds on imports."""
    done = CliRunner().invoke(app, arguments)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def test_user_error_exits_with_2_and_one_line() -> None:
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "info", "--model", "/no/such"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "/no/such: no such folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_command_line_imports_no_large_library() -> None:
    large = {"PIL", "av", "grpc", "jinja2", "numpy", "tokenizers", "torch", "urllib3"}
    code = f"import sys, octavo.engine.cli.main; print(sorted({large} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("command", [[], ["serve"], ["chat"], ["info"], ["bench", "throughput"]])
def test_help_lists_options(command: list[str]) -> None:
    done = octavo(*command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 8
    if command:
        assert "--model" in done.stdout


def test_serve_has_vllms_names() -> None:
    done = octavo("serve", "--help")
    names = ("--tensor-parallel-size", "--max-model-len", "--max-num-seqs", "--dtype", "--host")
    names += ("--max-num-batched-tokens", "--gpu-memory-utilization", "--port")
    for name in names:
        assert name in done.stdout, name


def test_a_model_without_its_option(checkpoint: str) -> None:
    """Accept `serve MODEL`, as vLLM does."""
    texts = [octavo("info", *given).stdout for given in ([checkpoint], ["--model", checkpoint])]
    first, second = (text.partition("  free now")[0] for text in texts)  # free memory varies
    assert first == second != ""
    done = octavo("info", checkpoint, "--model", "/no/such")
    assert done.returncode == 2 and "pass only one" in done.stderr
    for wrong, words in (
        (["/no/such"], "/no/such: no such folder"),
        (["--workers", ""], "is empty"),
    ):
        command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", *wrong]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and words in done.stderr


def test_info(checkpoint: str) -> None:
    done = octavo("info", "--model", checkpoint, "--json", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["layers"], found["attention_heads"], found["kv_heads"]) == (2, 4, 2)
    assert found["tensor_parallel_sizes"] == [1, 2, 4]
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert found["weight_bytes"] == 4 * found["parameters"]
    text = octavo("info", "--model", checkpoint)
    assert "KV cache" in text.stdout and "fits" in text.stdout


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_info_matches_what_serve_allocates(checkpoint: str, quantization: str | None) -> None:
    """Compare with the measurements of an engine with the same settings."""
    found = checkpoint_info(checkpoint, "huggingface", "float32", 1, quantization)
    with octavo_package.LLM(checkpoint, dtype="float32", quantization=quantization) as llm:
        assert found.kv_cache_tokens == llm.engine.num_blocks * 16
        assert found.weight_bytes == pytest.approx(llm.engine.group.memory.weight_bytes, rel=0.02)
    done = octavo("info", "--model", checkpoint, "--kv-cache-dtype", "fp8")
    assert (done.returncode, "only supported on GPUs" in done.stderr) == (2, True)


def test_info_of_the_real_shapes(tmp_path: Path) -> None:
    """A folder with only a config.json is enough for the 7B's requirements."""
    config = (Path(__file__).parents[1] / "data/config-7b.json").read_text()
    (tmp_path / "config.json").write_text(config)
    done = octavo("info", "--model", str(tmp_path), "--json", "--tensor-parallel-size", "4")
    found = json.loads(done.stdout)
    assert 8.2e9 < found["parameters"] < 8.4e9
    assert found["kv_bytes_per_token"] * 4 == 57_344
    assert found["tensor_parallel_sizes"] == [1, 2, 4]


def test_chat_without_a_server(checkpoint: str, tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    image = ["--image", str(tmp_path / "a.png")]
    done = octavo("chat", "--model", checkpoint, "--max-tokens", "5", *image, "What is it?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")


@pytest.mark.parametrize("num_requests", [1, 40])
def test_bench_scheduler(num_requests: int) -> None:
    options = ["--num-requests", str(num_requests), "--prompt-len", "50"]
    done = octavo("bench", "scheduler", *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"schedule_ms", "update_ms"}
    for call in found.values():
        assert set(call) == {"median", "p99"}
        assert 0 < call["median"] <= call["p99"]
    assert "median" in octavo("bench", "scheduler", *options).stdout


def test_bench_overhead() -> None:
    options = ["--ranks", "1", "--num-requests", "3", "--steps", "20", "--sleep-ms", "1"]
    done = octavo("bench", "overhead", *options, "--json")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["overlap"] for report in found] == [True, False]
    for report in found:
        assert report["step_ms"] > report["sleep_ms"] == 1.0
        assert report["between_ms"] == pytest.approx(report["step_ms"] - 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "scheduler", "--num-requests", "0"], "--num-requests 0"),
        (["chat", "--model", "/no/such", "hi"], "/no/such: no such folder"),
        (["chat", "--server", "127.0.0.1:1", "hi"], "UNAVAILABLE"),
        (["chat", "--server", "x:1", "--model", "y", "hi"], "cannot be combined"),
        (["chat", "--image", "/no/such.png", "hi"], "No such file"),
        (["chat", "--image", "http://x.org/a.png", "hi"], "http"),
        (["chat", "--temperature", "-3", "hi"], "temperature=-3.0"),
        (["info", "--model", "/no/such"], "/no/such: no such folder"),
        (["info", "--tensor-parallel-size", "3"], "1, 2, 4"),
        (["bench", "throughput", "--num-prompts", "0"], "--num-prompts 0"),
        (["bench", "throughput", "--image-size", "big"], "WIDTHxHEIGHT"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], words: str) -> None:
    done = octavo(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
