"""`octavo bench roofline`: stages partition the run, and their work follows from the shapes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.benchmarks import report
from octavo.benchmarks.roofline import stages
from octavo.benchmarks.roofline.machine import Sizes
from octavo.benchmarks.roofline.report import REST, Roofline, tables
from octavo.benchmarks.roofline.run import RooflineWorkload, run
from octavo.benchmarks.roofline.stages import (
    STAGES,
    Work,
    linear_work,
    paged_work,
    vision_work,
)
from octavo.engine.config.engine_config import EMBEDDED_MODEL, ModelConfig
from octavo.engine.model import decoder
from octavo.engine.model.weights import DenseWeight

SMALL = Sizes(buffer_bytes=8_000_000, rows=128, shapes=((512, 512),), repeats=20)
WORKLOAD = RooflineWorkload(3, 20, context=32, image_size=(56, 84), decode_steps=2)


@pytest.fixture(scope="module")
def found() -> Roofline:
    return run(EMBEDDED_MODEL, WORKLOAD, "float32", sizes=SMALL)


def test_stages_add_up_to_the_run(found: Roofline) -> None:
    assert [stage.name for stage in found.stages] == [*STAGES, REST]
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.seconds)
    assert all(stage.seconds > 0 for stage in found.stages)
    assert all(seconds > 0 for seconds in found.rest.values())
    assert found.seconds == pytest.approx(
        found.tower_seconds + found.prefill_seconds + sum(found.decode_steps)
    )


def test_work_by_hand() -> None:
    # 2 rows of 3 numbers in, 5 out, of 4 bytes, plus a weight of 60 bytes
    assert linear_work(2, 3, 5, 4, 60) == Work(60 + 2 * 8 * 4, 2 * 2 * 3 * 5)
    # a chunk of 2 whose tokens see 3 and 4, a decoding row that sees 6; 4 heads of 8, 2 for KV
    assert paged_work((2, 1), (4, 6), 4, 2, 8, 2) == Work(
        2 * (2 * 10 * 2 * 8 + 2 * 3 * 4 * 8), 4 * 4 * 8 * (3 + 4 + 6)
    )
    assert vision_work((2, 3), 4, 8, 2) == Work(2 * 4 * 5 * 4 * 8, 4 * 4 * 8 * (4 + 9))


def test_work_of_the_run(found: Roofline) -> None:
    """The work counted in a run matches the model's shapes."""
    config = ModelConfig.from_dir(EMBEDDED_MODEL)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    width, kv = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    a_layer = hidden * (width + 2 * kv) + width * hidden + 3 * hidden * inner
    work = {stage.name: stage for stage in found.stages}
    tokens = found.prefill_tokens
    assert tokens == 3 * (20 + 2 + (56 // 28) * (84 // 28))
    assert work["prefill linears"].operations == 2 * layers * a_layer * tokens
    assert work["decode linears"].operations == 2 * layers * a_layer * 3 * 2
    assert work["head"].operations == 2 * hidden * config.vocab_size * 3 * (1 + 2)
    count, context = tokens // 3, 32 + tokens // 3
    contexts = [context + step for step in (1, 2)]
    assert work["decode attention"].operations == layers * 4 * width * 3 * sum(contexts)
    pairs = count * 32 + count * (count + 1) // 2
    assert work["prefill attention"].operations == layers * 4 * width * 3 * pairs
    patches, vision = 4 * 6, config.vision
    seen = 4 * vision.embed_dim * 3 * patches**2
    assert work["vision attention"].operations == vision.depth * seen
    assert work["sampling"].operations == config.vocab_size * 3 * (1 + 2)
    (alone,) = (each for each in found.alone if each.rows == 3)
    assert alone.operations == 2 * 3 * (layers * a_layer + hidden * config.vocab_size)
    # a weight counts once per step, however often its layer is called
    products = 2 * width + 2 * kv + 2 * hidden + 2 * hidden + 3 * inner  # in and out, of a row
    decode_bytes = 2 * layers * 4 * (a_layer + 3 * products)
    assert work["decode linears"].bytes == decode_bytes


def test_fractions(found: Roofline) -> None:
    for stage in found.stages[:-1]:
        assert 0 < stage.fraction < 1.5, stage
    assert math.isnan(found.stages[-1].fraction)
    for fraction in (found.decode_fraction, found.prefill_fraction, found.vision_fraction):
        assert 0 < fraction < 1.5


def test_json_has_all(found: Roofline, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    report.publish(tables(found, "a run"), found.as_dict(), {"batch": 3}, file)
    written = json.loads(file.read_text())
    assert set(written["limits"]["peaks"]) == {"float32", "bfloat16", "int8"}
    assert written["machine"]["cores"] and written["limits"]["bandwidth"] > 0
    assert [stage["name"] for stage in written["stages"]] == [*STAGES, REST]
    assert written["stages"][-1]["fraction"] is None
    assert {each["rows"] for each in written["alone"]} == {1, 3, 16, 128}
    assert 0 <= written["others_share"] < 1
    assert {"decode_fraction", "prefill_fraction", "prefill_tokens_per_second"} <= set(written)


def test_model_functions_are_restored_afterwards(found: Roofline) -> None:
    assert decoder.paged_attention.__module__ == "octavo.kernels.paged_attention"
    assert DenseWeight.forward.__module__ == "octavo.engine.model.weights"


def test_a_text_run_has_no_vision() -> None:
    text = replace(WORKLOAD, image_size=None, context=0)
    found = run(EMBEDDED_MODEL, text, "float32", sizes=SMALL)
    assert found.tower_seconds == 0 and math.isnan(found.vision_fraction)
    assert found.stages[0].seconds == 0 and math.isnan(found.stages[0].fraction)


def test_image_sides_must_be_multiples_of_28() -> None:
    with pytest.raises(ValueError, match="--image-size 56x80: sides must be multiples of 28"):
        run(EMBEDDED_MODEL, replace(WORKLOAD, image_size=(56, 80)), sizes=SMALL)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 products")
def test_int8_linears_have_the_int8_peak() -> None:
    found = run(EMBEDDED_MODEL, WORKLOAD, "bfloat16", "int8", SMALL)
    linears, peaks = found.stages[0], found.machine.peaks
    bound = max(linears.bytes / found.machine.bandwidth, linears.operations / peaks["int8"])
    assert linears.limit_seconds == pytest.approx(bound)
    assert stages.HEAD in STAGES
