"""Regression bounds on counts and ratios: step overhead, copies of weights, operators per layer.

Each bound is slightly above the count measured when it was written.
"""

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_requests import TinyDriver, text, tiny_request
from octavo.benchmarks.step_overhead import sleeping
from octavo.engine.config.engine_config import EMBEDDED_MODEL, ModelConfig, PreprocessConfig
from octavo.engine.core.engine import Engine
from octavo.engine.model.decoder import DecoderLayer
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.loader import stored_tensors
from octavo.engine.runner.model_runner import ModelRunner
from octavo.kernels import native
from octavo.kernels.decoder_layers import PanelLayers
from octavo.kernels.panel_linear import serves_panels
from octavo.scheduler.params import SamplingParams

CPU = torch.device("cpu")
FORMS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]


def make_runner(folder: Path, dtype: str, quantization: str | None = None) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    kind: torch.dtype = getattr(torch, dtype)
    alone = TensorParallel()
    return ModelRunner(folder, config, preprocess, CPU, kind, 16, alone, quantization)


# The engine's cost of a step


@contextmanager
def counted_calls(engine: Engine) -> Iterator[list[Any]]:
    """Yield the list of messages that the engine sends its worker, by any method."""
    sent: list[Any] = []
    (worker,) = engine.group._workers

    class Method:
        def __init__(self, method: Any) -> None:
            self.method = method

        def __call__(self, request: Any, **how: Any) -> Any:
            sent.append(request)
            return self.method(request, **how)

        def future(self, request: Any, **how: Any) -> Any:
            sent.append(request)
            return self.method.future(request, **how)

    stub = worker.stub
    methods = {name: Method(method) for name, method in vars(stub).items()}
    with mock.patch.multiple(stub, **methods):
        yield sent


@pytest.mark.parametrize("overlap", [True, False])
def test_step_sends_one_small_message_per_rank(overlap: bool) -> None:
    settings: dict[str, Any] = {"max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30}
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    with sleeping(0), Engine(overlap_steps=overlap, **settings) as engine:
        for index in range(64):
            engine.add_request(None, {"prompt_token_ids": [index] * 32}, params)
        requests = list(engine.scheduler.requests.values())
        while any(request.num_output_tokens < 2 for request in requests):
            engine.step()
        before = sum(request.num_output_tokens for request in requests)
        with counted_calls(engine) as sent:
            for _ in range(10):
                engine.step()
        assert sum(request.num_output_tokens for request in requests) - before == 64 * 10
    assert len(sent) == 10
    assert max(message.ByteSize() for message in sent) / 64 < 90  # bytes per request


# Copies of the weights


def anonymous_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory, so that its reuse is counted
    status = Path("/proc/self/status").read_text()
    return sum(int(n) * 1024 for n in re.findall(r"RssAnon:\s+(\d+) kB", status))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint large enough that copies of its weights are noticeable."""
    folder = tmp_path_factory.mktemp("cost")
    size: dict[str, Any] = {"layers": 6, "heads": 16, "kv_heads": 4, "head_dim": 64}
    tower: dict[str, Any] = {"vision_layers": 6, "vision_heads": 8, "vision_head_dim": 64}
    return write_tiny_checkpoint(folder, vocab_size=4000, dtype="bfloat16", **size, **tower)


@pytest.mark.parametrize(("dtype", "quantization"), FORMS)
def test_weights_are_stored_once(checkpoint: Path, dtype: str, quantization: str | None) -> None:
    """A tied head is the exception: it is packed in addition to the embedding."""
    make_runner(EMBEDDED_MODEL, dtype, quantization).load()  # one-time allocations
    runner = make_runner(checkpoint, dtype, quantization)
    before = anonymous_bytes()
    runner.load()
    config, item = runner.config, 1 if quantization else runner.dtype.itemsize
    numbers = sum(torch.Size(each.shape).numel() for each in stored_tensors(checkpoint).values())
    embedding = config.vocab_size * config.hidden_size
    once = (numbers - embedding) * item + 2 * embedding * runner.dtype.itemsize
    assert runner.model.weight_bytes < 1.03 * once
    assert anonymous_bytes() - before < 1.05 * once


# Operators of a decoder layer


class Counter(TorchDispatchMode):
    """Counts torch operators (views included) and calls of our compiled kernels while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.operators, self.kernels = False, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += self.on
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "operators", "kernels"),
    [
        ("float32", 145, 0),
        pytest.param(
            "bfloat16", 22, 9,
            marks=pytest.mark.skipif(native.library() is None, reason="no compiled kernels"),
        ),
    ],
)  # fmt: skip
def test_operators_of_a_decoding_layer(
    dtype: str, operators: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PanelLayers, "serves", lambda hidden: False)  # see the next test
    runner = make_runner(EMBEDDED_MODEL, dtype)
    runner.load()
    runner.allocate(16)
    driver, counter = TinyDriver(runner, 16), Counter()
    requests = [tiny_request(runner.config, [text(seed, 20)]) for seed in range(4)]
    driver.step(requests, [20] * 4)
    forward, call = DecoderLayer.forward, native.call

    def counted(*arguments: Any) -> Any:
        counter.on = True
        try:
            return forward(*arguments)
        finally:
            counter.on = False

    def counted_call(*arguments: Any) -> None:
        counter.kernels += counter.on
        call(*arguments)

    with (
        mock.patch.object(DecoderLayer, "forward", counted),
        mock.patch.object(native, "call", counted_call),
        counter,
    ):
        driver.step(requests, [1] * 4)
    layers = runner.config.num_hidden_layers
    assert 0 < counter.operators / layers <= operators
    assert counter.kernels / layers <= kernels


@pytest.mark.skipif(not serves_panels(torch.ones(4, 4).bfloat16()), reason="no panels here")
def test_decode_step_is_three_kernels() -> None:
    """All layers, the last norm and the head are one kernel each."""
    runner = make_runner(EMBEDDED_MODEL, "bfloat16")
    runner.load()
    runner.allocate(16)
    driver = TinyDriver(runner, 16)
    requests = [tiny_request(runner.config, [text(seed, 20)]) for seed in range(4)]
    driver.step(requests, [20] * 4)
    with mock.patch.object(native, "call", side_effect=native.call) as call:
        driver.step(requests, [1] * 4)
    names = [each.args[0] for each in call.call_args_list]
    assert names == ["octavo_decoder_layers", "octavo_rms_norm", "octavo_linear"]
