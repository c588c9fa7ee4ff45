"""Quantised checkpoints: tiny ones, packed here by loops of our own, against dense ones that hold
what their weights mean; how ranks share them; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from safetensors.torch import load_file, save_file

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_requests import TinyDriver, image, text, tiny_request
from octavo.engine.cli.info import checkpoint_info
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.config.quantization import MERGED, WeightFormat, read_weight_format
from octavo.engine.errors import ConfigError
from octavo.engine.model import quantized
from octavo.engine.model.parallel import TensorParallel, valid_tensor_parallel_sizes
from octavo.engine.model.quantized import Fp8Weight, Int4Weight
from octavo.engine.model.qwen2_vl import Qwen2VL
from octavo.engine.runner import loader
from octavo.engine.runner.loader import check_weight_format, load_weights
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.sampler import Sampler
from octavo.kernels.int4_layout import PackedInt4, unpack_int4

CPU = torch.device("cpu")
DATA = Path(__file__).parents[1] / "data"
INTERPRETED = triton.knobs.runtime.interpret
GROUP = 64
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm",
       "zero_point": True, "modules_to_not_convert": ["visual"]}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
        "damp_percent": 0.1, "true_sequential": True}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
STATIC = {**FP8, "activation_scheme": "static"}
E4M3 = {"num_bits": 8, "type": "float", "symmetric": True}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**E4M3, "strategy": "channel", "dynamic": False},
            "input_activations": {**E4M3, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["re:visual.*", "re:.*lm_head"],
}
CONFIGS = {"awq": AWQ, "gptq": GPTQ, "fp8": FP8, "static": STATIC, "channel": CHANNEL}
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
Tensors = dict[str, torch.Tensor]


def words(rows: list[list[int]], order: tuple[int, ...]) -> torch.Tensor:
    """Four bits i of a word are number order[i] of eight, along a row."""
    made = []
    for row in rows:
        eights = [row[at : at + 8] for at in range(0, len(row), 8)]
        made.append([sum(eight[order[i]] << 4 * i for i in range(8)) for eight in eights])
    wide = torch.tensor(made, dtype=torch.int64)
    return torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32)


def pack_int4(name: str, weight: torch.Tensor, method: str) -> tuple[Tensors, torch.Tensor]:
    """A layer's tensors in the checkpoint, and the dense weight [out, in] that they mean."""
    out_size, in_size = weight.shape
    grouped = weight.float().view(out_size, -1, GROUP)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    numbers = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    meant = ((numbers - zeros[..., None]) * scales.float()[..., None]).view(out_size, in_size)
    numbers, plain = numbers.view(out_size, in_size).int(), tuple(range(8))
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        qweight = words(numbers.T.tolist(), order)
        qzeros = words(zeros.T.int().tolist(), order)
    else:
        qweight = words(numbers.tolist(), plain).T.contiguous()
        qzeros = words((zeros.T.int() - 1).tolist(), plain)
    base = name.removesuffix(".weight")
    made = {"qweight": qweight, "qzeros": qzeros, "scales": scales.T.contiguous()}
    if method == "gptq":
        made["g_idx"] = (torch.arange(in_size) // GROUP).int()
        if not base.endswith(("q_proj", "k_proj", "v_proj")):
            made["bias"] = torch.zeros(out_size).half()  # as optimum writes them
    return {f"{base}.{part}": tensor for part, tensor in made.items()}, meant


def pack_fp8(name: str, weight: torch.Tensor, kind: str) -> tuple[Tensors, torch.Tensor]:
    base, most = name.removesuffix(".weight"), weight.float().abs()
    scale = most.amax(1, keepdim=True) / 448 if kind == "channel" else most.amax() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    made = {name: stored, f"{base}.weight_scale": scale}
    if kind == "static":  # one number, in either of the shapes that writers give it
        shape = (1,) if base.endswith("q_proj") else ()
        made[f"{base}.input_scale"] = torch.tensor(0.02 if "q_proj" in base else 0.01).view(shape)
    return made, stored.float() * scale


def write(folder: Path, kind: str, left: str = "", **shape: Any) -> tuple[Path, Path]:
    """A quantised checkpoint, and a dense one of the weights that it means. What matches `left` is
    dense in both."""
    plain = {"heads": 8, "kv_heads": 4, "tied": False}
    dense = write_tiny_checkpoint(folder / "dense", **{**plain, **shape})
    quantised = write_tiny_checkpoint(folder / kind, **{**plain, **shape})
    kept, tensors = load_file(dense / "model.safetensors"), {}
    for name, tensor in list(kept.items()):
        if not LINEAR.fullmatch(name) or (left and re.search(left, name)):
            tensors[name] = tensor
            continue
        pack = pack_int4 if kind in ("awq", "gptq") else pack_fp8
        made, meant = pack(name, tensor, kind)
        tensors |= made
        kept[name] = meant.contiguous()
    save_file(kept, dense / "model.safetensors", {"format": "pt"})
    save_file(tensors, quantised / "model.safetensors", {"format": "pt"})
    configure(quantised, CONFIGS[kind])
    return quantised, dense


def configure(folder: Path, stored: dict[str, Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": stored}))


def load(folder: Path, dtype: torch.dtype = torch.float32, rank: int = 0, size: int = 1) -> Qwen2VL:
    config = ModelConfig.from_dir(folder)
    model = Qwen2VL(config, TensorParallel(rank, size), dtype)
    load_weights(model, folder, config, CPU)
    return model


def logits(folder: Path, dtype: torch.dtype, quantization: str | None = None) -> torch.Tensor:
    """Of a few steps of a prompt with an image."""
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    runner = ModelRunner(folder, config, preprocess, CPU, dtype, 16, TensorParallel(), quantization)
    runner.load()
    runner.allocate(16)
    seen: list[torch.Tensor] = []

    class Recording:
        def __init__(self, inner: Sampler) -> None:
            self.sample = lambda logits, *rest: (
                seen.append(logits.clone()) or inner.sample(logits, *rest)
            )

    runner.sampler = Recording(runner.sampler)  # type: ignore[assignment]
    request = tiny_request(config, [text(1, 9), *image(2, 56, 56), text(3, 4)])
    TinyDriver(runner, 16).generate([request], 1 if INTERPRETED else 4)
    return torch.cat(seen)


@pytest.mark.skipif(INTERPRETED, reason="the CPU's form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_what_the_weights_mean(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    quantised, dense = write(tmp_path, kind)
    found, expected = (logits(folder, dtype) for folder in (quantised, dense))
    assert torch.equal(found, expected)
    assert load(quantised, dtype).weight_bytes == load(dense, dtype).weight_bytes


@pytest.mark.skipif(INTERPRETED, reason="the CPU's form")
def test_int8_goes_on_top_of_what_the_weights_mean(tmp_path: Path) -> None:
    quantised, dense = write(tmp_path, "awq")
    found, expected = (logits(each, torch.bfloat16, "int8") for each in (quantised, dense))
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(dense, torch.bfloat16))


@pytest.mark.parametrize("kind", CONFIGS)
def test_kernel_form(kind: str, tmp_path: Path) -> None:
    """In Triton's interpreter: the layouts of a GPU, and products by the kernels."""
    if not INTERPRETED:
        pytest.skip("kernels/test_interpreter.py runs it")
    quantised, dense = write(tmp_path, kind, layers=1, vision_layers=1)
    model = load(quantised, torch.float16)
    down = model.decoder.layers[0].mlp.down.weight
    assert isinstance(down, Int4Weight if kind in ("awq", "gptq") else Fp8Weight)
    assert isinstance(down.weight, PackedInt4) or down.weight.dtype == torch.float8_e4m3fn
    assert model.weight_bytes < load(dense, torch.float16).weight_bytes
    if kind in ("awq", "gptq"):
        found, expected = (logits(each, torch.float16).float() for each in (quantised, dense))
        assert (found - expected).abs().max() < 0.01 * expected.abs().max()
        return
    other = load(dense, torch.float16).decoder.layers[0]
    for name in ("attention.qkv", "attention.o_proj", "mlp.gate_up", "mlp.down"):
        fp8 = model.decoder.layers[0].get_submodule(name).weight
        weight = other.get_submodule(name).weight
        scale = 0.02 if "qkv" in name else 0.01  # the largest of q, k and v
        if kind == "static":
            assert fp8.input_scale.tolist() == pytest.approx([scale])
        x = exact_rows(weight.weight.shape[1]) * (scale if kind == "static" else 1)
        found, expected = (each(x.half()).float() for each in (fp8, weight))
        assert (found - expected).abs().max() < 0.003 * expected.abs().max(), name


def exact_rows(size: int) -> torch.Tensor:
    """e4m3 numbers whose own scale is 1, none of them a power of two: Triton's interpreter loses
    the carry where a number rounds up to one."""
    rows = torch.tensor([3.0, -5.0, 6.0, -7.0, 1.5, 0.0])[torch.randint(0, 6, (3, size))]
    rows[:, 0] = 448
    return rows


@pytest.mark.skipif(INTERPRETED, reason="the CPU's form")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", CONFIGS)
def test_ranks_hold_the_same_shards_as_of_a_dense_one(kind: str, size: int, tmp_path: Path) -> None:
    shape = {"heads": 16, "kv_heads": 2}  # on 4 ranks copies of KV heads; hidden 256
    quantised, dense = write(tmp_path, kind, layers=1, vision_layers=1, **shape)
    for rank in range(size):
        found, expected = (
            dict(load(each, rank=rank, size=size).named_parameters()) for each in (quantised, dense)
        )
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_shards_fall_between_groups(tmp_path: Path) -> None:
    raw = json.loads((DATA / "config-2b.json").read_text())
    sizes = {}
    for name in ("2b", "7b", "72b"):
        raw = json.loads((DATA / f"config-{name}.json").read_text())
        inner = 29696 if name == "72b" else raw["intermediate_size"]  # as Qwen pads its Int4
        stored = {**AWQ, "group_size": 128}
        raw = {**raw, "intermediate_size": inner, "quantization_config": stored}
        sizes[name] = valid_tensor_parallel_sizes(ModelConfig.from_dict(raw))
    assert sizes == {"2b": (1, 2), "7b": (1, 2, 4), "72b": (1, 2, 4, 8)}
    quantised, _ = write(tmp_path, "gptq", layers=1, vision_layers=1)
    message = r"tensor_parallel_size=4: .* 8 attention heads in gptq .*64.* supports sizes 1, 2"
    with pytest.raises(ConfigError, match=message):
        load(quantised, size=4)
    info = checkpoint_info(str(quantised), "huggingface", "float32", 2)
    assert info.tensor_parallel_sizes == (1, 2) and "int4, groups of 64" in info.as_text()
    with pytest.raises(ConfigError, match=message):
        checkpoint_info(str(quantised), "huggingface", "float32", 4)


LEFT: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {"modules_to_not_convert": ["visual", "mlp.down_proj"]}, r"mlp\.down"),
    ("gptq", {"modules_to_not_convert": ["visual", "layers.1.self_attn"]}, r"layers\.1\.self_attn"),
    ("fp8", {"ignored_layers": ["lm_head", "model.layers.0.mlp.gate_proj",
                                "model.layers.0.mlp.up_proj"]}, r"layers\.0\.mlp\.(gate|up)"),
    ("static", {"ignored_layers": ["o_proj"]}, "o_proj"),
    ("channel", {"ignore": ["re:.*lm_head", "re:model.language_model.layers.0.*"]}, r"layers\.0\."),
]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the CPU's form")
@pytest.mark.parametrize(("kind", "fields", "left"), LEFT, ids=[each[0] for each in LEFT])
def test_layers_that_the_config_leaves_dense(
    kind: str, fields: dict[str, Any], left: str, tmp_path: Path
) -> None:
    quantised, dense = write(tmp_path, kind, left)
    configure(quantised, {**CONFIGS[kind], **fields})
    found, expected = (logits(folder, torch.float32) for folder in (quantised, dense))
    assert torch.equal(found, expected)
    config = ModelConfig.from_dir(quantised)
    names = [f"{layer}.{name}" for layer in range(2) for parts in MERGED for name in parts]
    there = {name for name in names if re.search(left, f"model.layers.{name}")}
    assert config.weight_format and config.weight_format.dense == there and there
    assert f"{len(there)} layers dense" in config.weight_format.label
    shards = [dict(load(each, size=2).named_parameters()) for each in (quantised, dense)]
    assert all(torch.equal(shards[0][name], shards[1][name]) for name in shards[1])
    configure(quantised, CONFIGS[kind])
    with pytest.raises(ConfigError, match=r"the checkpoint (lacks|holds)"):
        load(quantised)


def test_a_name_that_is_no_list_is_rejected() -> None:
    """A text would be taken for a list of its letters, and "l" is in every name."""
    for wrong in ("lm_head", [1]):
        with pytest.raises(ConfigError, match=r"modules_to_not_convert=.*must be a list of names"):
            read_weight_format({**AWQ, "modules_to_not_convert": wrong}, 28)


def test_a_name_is_matched_as_its_list_means_it() -> None:
    """AWQ's by any part; the others' by whole modules, so that layer 1 is not 10 to 19."""
    cases = [("modules_to_not_convert", 11), ("ignored_layers", 1), ("ignore", 1)]
    for field, layers in cases:
        stored = read_weight_format({**AWQ, field: ["model.layers.1"]}, 28)
        assert stored is not None and len(stored.dense) == 7 * layers, field
    assert stored.of(1, "mlp.down_proj") is None and stored.of(10, "mlp.down_proj") is stored


# As Qwen publishes them (72B's AWQ, and what optimum and AutoGPTQ write for GPTQ-Int4).
QWEN_AWQ = {"bits": 4, "group_size": 128, "modules_to_not_convert": ["visual"],
            "quant_method": "awq", "version": "gemm", "zero_point": True}  # fmt: skip
QWEN_GPTQ = {"bits": 4, "damp_percent": 0.1, "dataset": None, "desc_act": False, "group_size": 128,
             "modules_in_block_to_quantize": None, "quant_method": "gptq", "sym": True,
             "true_sequential": True}  # fmt: skip


@pytest.mark.parametrize("stored", [QWEN_AWQ, QWEN_GPTQ], ids=["awq", "gptq"])
def test_configs_as_qwen_publishes_them(stored: dict[str, Any]) -> None:
    raw = json.loads((DATA / "config-72b.json").read_text())
    raw |= {"intermediate_size": 29696, "quantization_config": stored}
    found = ModelConfig.from_dict(raw).weight_format
    assert found == WeightFormat(stored["quant_method"], 128)
    model = Qwen2VL(ModelConfig.from_dict(raw), TensorParallel(0, 8), torch.bfloat16)
    names = {each.name for each in model.weight_loaders()}
    assert {
        f"model.layers.79.mlp.down_proj.{part}" for part in ("qweight", "qzeros", "scales")
    } < names
    assert {"visual.blocks.0.attn.qkv.weight", "lm_head.weight"} < names
    assert "model.layers.0.self_attn.q_proj.bias" in names


def nested(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    copy = json.loads(json.dumps(CHANNEL))
    change(copy["config_groups"]["group_0"])
    return copy


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes': must be 'awq' or 'gptq'"),
    ({}, "quant_method=None"),
    ({**AWQ, "bits": 8}, "bits=8: must be 4"),
    ({**AWQ, "version": "gemv"}, "version='gemv': must be 'gemm'"),
    ({**AWQ, "zero_point": False}, "zero_point=False: must be True"),
    ({**AWQ, "group_size": -1}, "group_size=-1"),
    ({**AWQ, "group_size": 100}, "group_size=100: must divide"),
    (
        {**AWQ, "modules_to_not_convert": ["k_proj"]},
        "in layer 0 self_attn.k_proj is dense and",
    ),
    (
        {**FP8, "ignored_layers": ["layers.7.mlp.up_proj"]},
        "layer 7 mlp.up_proj .* mlp.gate_proj is",
    ),
    ({**GPTQ, "bits": 8}, "bits=8: must be 4"),  # Qwen's GPTQ-Int8
    ({**GPTQ, "checkpoint_format": "gptq_v2"}, "checkpoint_format='gptq_v2': must be 'gptq'"),
    ({**GPTQ, "lm_head": True}, "lm_head=True"),
    ({**GPTQ, "dynamic": {"-:x": {}}}, "dynamic="),
    (
        {**FP8, "activation_scheme": "none"},
        "activation_scheme='none': must be 'dynamic' or 'static'",
    ),
    ({**FP8, "weight_block_size": [128, 128]}, r"weight_block_size=\[128, 128\]: is not supported"),
    ({**FP8, "fmt": "e5m2"}, "fmt='e5m2'"),
    ({**CHANNEL, "format": "pack-quantized"}, "format='pack-quantized': must be 'float-quantized'"),
    ({**CHANNEL, "kv_cache_scheme": E4M3}, "kv_cache_scheme="),
    ({**CHANNEL, "sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format='sparse-24'"),
    ({**CHANNEL, "config_groups": {}}, "config_groups="),
    (
        {**CHANNEL, "ignore": [r"re:.*layers\.1\..*v_proj"]},
        r"layer 1 self_attn.v_proj is dense",
    ),
    ({**CHANNEL, "ignore": ["re:("]}, "not a valid regular expression"),
    (nested(lambda g: g["weights"].update(num_bits=4)), "group_0.weights.num_bits=4"),
    (
        nested(lambda g: g["weights"].update(type="int")),
        "group_0.weights.type='int': must be 'float'",
    ),
    (
        nested(lambda g: g["weights"].update(strategy="block")),
        "strategy='block': must be 'channel'",
    ),
    (nested(lambda g: g.update(input_activations=None)), "input_activations=None"),
    (nested(lambda g: g.update(targets=["Conv"])), "targets="),
    (nested(lambda g: g["input_activations"].update(strategy="group")), "strategy='group'"),
]


@pytest.mark.parametrize(("stored", "message"), REFUSED, ids=[each[1][:40] for each in REFUSED])
def test_what_is_not_served_is_named(stored: dict[str, Any], message: str) -> None:
    raw = json.loads((DATA / "config-7b.json").read_text())
    stored = {**stored, "quant_method": stored.get("quant_method")}
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**raw, "quantization_config": stored})


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    more = {} if tensor is None else {name: tensor}
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})


def test_gptq_in_another_order_is_rejected_before_anything_is_read(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "gptq", layers=1, vision_layers=1)
    name = "model.layers.0.mlp.down_proj"
    configure(folder, {**GPTQ, "desc_act": True})
    load(folder)  # its g_idx are in order all the same
    change(folder, f"{name}.g_idx", (torch.arange(256).flip(0) // GROUP).int())
    config = ModelConfig.from_dir(folder)
    model = Qwen2VL(config, TensorParallel(), torch.float32)
    with pytest.raises(ConfigError, match=rf"{name}\.g_idx .*order.*desc_act=false"):
        load_weights(model, folder, config, CPU)
    assert all(param.is_meta for param in model.parameters())
    change(folder, f"{name}.g_idx", None)
    with pytest.raises(ConfigError, match=rf"lacks {name}\.g_idx, which desc_act"):
        load(folder)
    configure(folder, GPTQ)
    load(folder)
    change(folder, f"{name}.bias", torch.ones(128))
    with pytest.raises(ConfigError, match=rf"does not define: {name}\.bias"):
        load(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "awq", layers=1, vision_layers=1)
    name = "model.layers.0.mlp.up_proj"
    change(folder, f"{name}.qweight", torch.zeros(128, 32))
    with pytest.raises(ConfigError, match=r"up_proj\.qweight .*dtype F32; must be I32"):
        load(folder)
    change(folder, f"{name}.qweight", torch.zeros(16, 256, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"up_proj\.qweight .*\[16, 256\].* \[128, 32\]"):
        load(folder)
    configure(folder, FP8)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.0.*\.weight"):
        load(folder)
    change(folder, "model.norm.weight", torch.zeros(128).to(torch.float8_e4m3fn))
    change(folder, f"{name}.qweight", torch.zeros(128, 32, dtype=torch.int32))
    configure(folder, AWQ)
    with pytest.raises(ConfigError, match=r"norm\.weight .*dtype F8_E4M3; must be BF16"):
        load(folder)


def test_a_gpu_without_the_product_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((DATA / "config-7b.json").read_text())

    def config(stored: dict[str, Any]) -> ModelConfig:
        return ModelConfig.from_dict({**raw, "quantization_config": stored})

    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    check_weight_format(config(AWQ), cuda, bf16)
    with pytest.raises(ConfigError, match=r"float32.*bfloat16 or float16"):
        check_weight_format(config(AWQ), cuda, torch.float32)
    small = config({**AWQ, "group_size": 32})
    with pytest.raises(ConfigError, match="group_size=32: must be 64 or"):
        check_weight_format(small, cuda, bf16)
    check_weight_format(small, CPU, torch.float32)

    def old(device: torch.device) -> None:
        raise ValueError("A100: has no e4m3 products")

    monkeypatch.setattr(loader, "check_fp8", old)
    with pytest.raises(ConfigError, match=r"fp8 \(e4m3\): A100"):
        check_weight_format(config(FP8), cuda, bf16)


def test_progress_counts_every_byte_of_the_file_once(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "awq", layers=1, vision_layers=1)
    config = ModelConfig.from_dir(folder)
    model, seen = Qwen2VL(config, TensorParallel(), torch.float32), []
    load_weights(model, folder, config, CPU, lambda done, total: seen.append((done, total)))
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (stored, stored)


def test_one_layer_at_a_time_is_held_as_it_was_stored(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "awq", vision_layers=1)
    config = ModelConfig.from_dir(folder)
    model, most = Qwen2VL(config, TensorParallel(), torch.float32), 0

    def held() -> int:
        weights = [each for each in model.modules() if isinstance(each, Int4Weight)]
        assert len(weights) == 8
        stored = [each._parameters.get("qweight") for each in weights]
        return sum(each is not None and not each.is_meta for each in stored)

    def watch(done: int, total: int) -> None:
        nonlocal most
        most = max(most, held())

    load_weights(model, folder, config, CPU, watch)
    assert most == 1 and held() == 0


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_inputs_are_unpacked_some_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs, the last one not whole: as one dense weight, and in the kernel's layout."""
    monkeypatch.setattr(quantized, "SLAB", 256)
    out_size, in_size = 24, 704
    made, meant = pack_int4("x.weight", torch.randn(out_size, in_size), kind)
    for finished in (False, True):
        weight = Int4Weight(WeightFormat(kind, GROUP), out_size, in_size, bias=False)
        for part in weight.loaders("x", (out_size, in_size)):
            part.load(made[part.name], CPU)
        if not finished:
            packed = weight._packed()
            assert packed.words.shape == (3, out_size, 32)
            assert torch.equal(unpack_int4(packed).dequantize(), meant)
        elif not INTERPRETED:
            weight.finish(None)
            x = torch.eye(in_size)
            torch.testing.assert_close(weight(x), meant.T.contiguous())


@pytest.mark.skipif(INTERPRETED, reason="the CPU's form")
def test_two_ranks_answer_as_one_with_a_dense_checkpoint(tmp_path: Path) -> None:
    quantised, dense = write(tmp_path, "gptq")
    params = octavo.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    messages = [{"role": "user", "content": "Who are you, and what do you do all day?"}]
    answers = []
    for folder, size in ((quantised, 2), (dense, 1)):
        settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 256}
        with octavo.LLM(folder, tensor_parallel_size=size, **settings) as llm:
            answers.append(llm.chat(messages, params)[0].outputs[0].token_ids)
    assert answers[0] == answers[1] and len(set(answers[0])) > 3
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=4: .* supports sizes 1, 2"):
        octavo.LLM(quantised, tensor_parallel_size=4)
