"""All decoder layers in one call: bitwise equality with single layers, and conditions of use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from octavo.benchmarks.fakes.tiny_requests import TinyDriver, text, tiny_request
from octavo.engine.config.engine_config import EMBEDDED_MODEL, ModelConfig, PreprocessConfig
from octavo.engine.model.decoder import DecoderLayer
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.model_runner import ModelRunner
from octavo.kernels import native
from octavo.kernels.decoder_layers import PanelLayers
from octavo.kernels.linear import PACKED_ROWS
from octavo.kernels.paged_attention_cpu import SPLIT_SIZE
from octavo.kernels.panel_linear import serves_panels

CPU = torch.device("cpu")
needs_panels = pytest.mark.skipif(
    not serves_panels(torch.ones(4, 4).bfloat16()), reason="weights are not in panels here"
)


def make_runner(dtype: torch.dtype, quantization: str | None = None) -> ModelRunner:
    config = ModelConfig.from_dir(EMBEDDED_MODEL)
    preprocess, alone = PreprocessConfig.from_dir(EMBEDDED_MODEL), TensorParallel()
    runner = ModelRunner(EMBEDDED_MODEL, config, preprocess, CPU, dtype, 16, alone, quantization)
    runner.load()
    runner.allocate(80)
    return runner


def run(runner: ModelRunner) -> list[torch.Tensor]:
    """Return the decoder's outputs in steps with chunks, with both, and with one token per row."""
    requests = [tiny_request(runner.config, [text(n, n)]) for n in (SPLIT_SIZE + 40, 20, 90)]
    driver, found = TinyDriver(runner, 80), []
    forward = runner.model.decoder.forward

    def kept(*arguments: Any) -> torch.Tensor | None:
        logits = forward(*arguments)
        if logits is not None:
            found.append(logits.clone())
        return logits

    with mock.patch.object(runner.model.decoder, "forward", kept):
        driver.step(requests[:1], [SPLIT_SIZE + 40])
        driver.step(requests, [1, 20, 90])
        for count in (3, 2, 1):
            driver.step(requests[:count], [1] * count)
    return [*found, *(cache.clone() for pair in runner.caches for cache in pair)]


def count_layers(runner: ModelRunner) -> tuple[int, int]:
    """Count the calls for all layers together, and for single layers."""
    with (
        mock.patch.object(
            PanelLayers, "__call__", autospec=True, side_effect=PanelLayers.__call__
        ) as together,
        mock.patch.object(
            DecoderLayer, "forward", autospec=True, side_effect=DecoderLayer.forward
        ) as alone,
    ):
        run(runner)
    return together.call_count, alone.call_count


@needs_panels
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_results_are_bitwise_equal_to_layer_by_layer(quantization: str | None) -> None:
    together = run(make_runner(torch.bfloat16, quantization))
    with mock.patch.object(PanelLayers, "serves", lambda hidden: False):
        alone = run(make_runner(torch.bfloat16, quantization))
    assert len(together) == len(alone) > 5
    for mine, expected in zip(together, alone, strict=True):
        assert torch.equal(mine, expected)


@needs_panels
def test_only_small_steps_use_one_call() -> None:
    runner = make_runner(torch.bfloat16)
    assert SPLIT_SIZE + 40 > PACKED_ROWS >= 111
    assert count_layers(runner) == (4, runner.config.num_hidden_layers)


def test_other_weights_run_layer_by_layer() -> None:
    runner = make_runner(torch.float32)
    assert count_layers(runner) == (0, 5 * runner.config.num_hidden_layers)


@needs_panels
def test_tensor_parallel_ranks_run_layer_by_layer() -> None:
    """Their results are summed over the ranks within each layer."""
    runner = make_runner(torch.bfloat16)
    layer = runner.model.decoder.layers[0]
    assert layer.panels(runner.caches[0]) is not None
    layer.attention.o_proj.parallel = replace(layer.attention.o_proj.parallel, size=2)
    assert layer.panels(runner.caches[0]) is None


@needs_panels
def test_reallocated_caches_are_used() -> None:
    runner = make_runner(torch.bfloat16)
    first = run(runner)
    runner.allocate(80)
    assert all(torch.equal(a, b) for a, b in zip(run(runner), first, strict=True))


def test_layers_run_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    runner = make_runner(torch.bfloat16)
    assert count_layers(runner)[0] == 0
