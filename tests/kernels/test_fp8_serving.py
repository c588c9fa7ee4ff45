"""FP8 KV cache from the setting to the outputs; on a CPU with the reference implementations."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import octavo
from octavo.benchmarks.eval_demo_model import KINDS, questions
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_engine import TinyEngine
from octavo.benchmarks.fakes.tiny_requests import TinyRequest, image, text, tiny_request
from octavo.benchmarks.kernels.resources import MODELS, shape_of
from octavo.engine.config.engine_config import (
    EMBEDDED_MODEL,
    EngineConfig,
    ModelConfig,
    PreprocessConfig,
)
from octavo.engine.core.kv_capacity import plan_capacity
from octavo.engine.errors import ConfigError
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.decode_graph import DecodeGraphs, StaticDecode
from octavo.engine.runner.kv_cache import kv_block_bytes
from octavo.engine.runner.loader import resolve_kv_cache_dtype
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.worker import process
from octavo.engine.worker.loading import GroupMemory
from octavo.kernels.fp8_linear import FP8
from octavo.scheduler.admission import SchedulerConfig

INTERPRETED = triton.knobs.runtime.interpret
CPU = torch.device("cpu")
CONFIG = SchedulerConfig(
    num_blocks=64,
    block_size=16,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    max_encode_tokens=1024,
    encoder_cache_tokens=1024,
    max_model_len=128,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def make_runner(folder: Path, num_blocks: int) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    args = (folder, config, preprocess, CPU, torch.float32, 16, TensorParallel())
    runner = ModelRunner(*args, kv_cache_dtype=FP8)
    runner.load()
    runner.allocate(num_blocks)
    return runner


def outputs(runner: ModelRunner, limits: dict[str, int], names: list[str]) -> dict[str, list[int]]:
    """Run two prompts, one with an image and two sampled forks, through the scheduler."""
    engine = TinyEngine(runner, replace(CONFIG, **limits))
    for i, name in enumerate(names):
        parts: list[Any] = [text(i, 20), *image(i, 56, 56), text(5, 3)] if i else [text(9, 40)]
        request: TinyRequest = tiny_request(runner.config, parts)
        request.params = replace(request.params, temperature=1.0, seed=4)
        engine.add(name, request, 9, num_forks=2 if i else 0)
    engine.run()
    if limits.get("num_blocks", 64) < 64:
        assert any(request.num_preemptions for request in engine.requests.values())
    return {name: engine.output(name) for name in engine.requests}


@pytest.mark.skipif(INTERPRETED, reason="slow there")
def test_chunks_preemption_and_forks_do_not_change_tokens(folder: Path) -> None:
    """Scales are per token, so chunking and other requests in the batch must not matter."""
    whole = make_runner(folder, 64)
    expected = outputs(whole, {}, ["a", "b"])
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    cut = {"max_num_batched_tokens": 7}
    assert outputs(make_runner(folder, 64), cut, ["a", "b"]) == expected
    assert outputs(make_runner(folder, 4), {"num_blocks": 4}, ["a", "b"]) == expected
    assert outputs(make_runner(folder, 64), {}, ["a"])["a"] == expected["a"]


@pytest.mark.skipif(not INTERPRETED, reason="test_interpreter.py runs it")
def test_static_decode_steps_match_plain_steps(folder: Path) -> None:
    """Run the steps that CUDA graphs replay, with an e4m3 cache."""
    plain, static = make_runner(folder, 64), make_runner(folder, 64)
    decode = StaticDecode(static.model.decoder, static.caches, 256, CPU)
    static.graphs = DecodeGraphs(decode, lambda compute: compute)
    assert outputs(static, {}, ["a", "b"]) == outputs(plain, {}, ["a", "b"])
    assert static.graphs.replays


def test_block_bytes_match_the_allocation(folder: Path) -> None:
    runner = make_runner(folder, 4)
    held = sum(k.nbytes + v.nbytes for k, v in runner.caches)
    assert runner.measure().kv_block_bytes * 4 == held


@pytest.mark.parametrize("model", MODELS)
def test_fp8_cache_holds_nearly_twice_the_tokens(model: str) -> None:
    shape = shape_of(model, 1)
    config = replace(
        ModelConfig.from_dir(EMBEDDED_MODEL), num_hidden_layers=28, head_dim=128,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    bytes_of = {kind: kv_block_bytes(config, 1, 16, kind) for kind in (torch.bfloat16, FP8)}
    assert bytes_of[FP8] == 2 * 28 * 16 * shape.kv_heads * (128 + 4)
    asked = EngineConfig(kv_cache_memory_bytes=1 << 30, max_model_len=8192)
    tokens = []
    for size in bytes_of.values():
        memory = GroupMemory(1, 1 << 36, 1 << 36, size, "bfloat16", "cuda")
        tokens.append(16 * plan_capacity(asked, config, memory)[0])
    assert tokens[1] / tokens[0] == pytest.approx(256 / 132, rel=0.01)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp9': must be auto or fp8"):
        EngineConfig(kv_cache_dtype="fp9")
    for device in (CPU, torch.device("cuda")):
        for name in ("auto", ""):
            assert resolve_kv_cache_dtype(name, device, torch.float16) == torch.float16
    assert resolve_kv_cache_dtype("fp8", torch.device("cuda"), torch.float16) == FP8
    with pytest.raises(
        ConfigError, match="kv_cache_dtype='fp8': only supported on GPUs; remove it on cpu"
    ):
        resolve_kv_cache_dtype("fp8", CPU, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="an engine's workers would be interpreted too")
def test_cpu_is_rejected() -> None:
    """The setting reaches the worker, and its error text reaches the caller."""
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp8': only supported on GPUs"):
        octavo.LLM(device="cpu", kv_cache_dtype="fp8")


@pytest.fixture
def oracle_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(process, "WORKER_MODULE", "octavo.tests.support.fp8_cache_worker")
    yield


@pytest.mark.skipif(INTERPRETED, reason="an engine's workers would be interpreted too")
@pytest.mark.usefixtures("oracle_worker")
def test_embedded_model_gives_nearly_the_same_answers() -> None:
    """Use the reference implementations on the CPU, through an engine and its worker."""
    asked = [question for kind in KINDS for question in islice(questions(kind, 7), 5)]
    greedy = octavo.SamplingParams(temperature=0, max_tokens=32)
    found = []
    for kind in ("auto", "fp8"):
        with octavo.LLM(device="cpu", dtype="float32", kv_cache_dtype=kind) as llm:
            answers = llm.chat([question.messages for question in asked], greedy)
            found.append([answer.outputs[0].token_ids for answer in answers])
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same >= 0.95 * len(asked)
