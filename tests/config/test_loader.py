"""The loader: every form of a checkpoint, what is wrong with one, and the memory it takes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.benchmarks.fakes.tiny_checkpoint import (
    checkpoint_shapes,
    nested_name,
    write_tiny_checkpoint,
)
from octavo.engine.config.engine_config import (
    EMBEDDED_MODEL,
    EngineConfig,
    ModelConfig,
    PreprocessConfig,
)
from octavo.engine.config.generation_config import generation_defaults
from octavo.engine.core.kv_capacity import plan_capacity
from octavo.engine.errors import ConfigError
from octavo.engine.model.parallel import (
    TensorParallel,
    check_tensor_parallel_size,
    kv_heads_of_rank,
    num_kv_heads_per_rank,
    valid_tensor_parallel_sizes,
)
from octavo.engine.model.qwen2_vl import Qwen2VL
from octavo.engine.model.weights import WeightLoader
from octavo.engine.runner import loader
from octavo.engine.runner.kv_cache import activation_bytes, kv_block_bytes
from octavo.engine.runner.loader import canonical_name, load_weights, resolve_dtype, stored_tensors
from octavo.engine.worker.group import GroupMemory

CPU = torch.device("cpu")
DATA = Path(__file__).parents[1] / "data"
REAL = ("2b", "7b", "72b")
SIZES = {"2b": (1, 2, 4), "7b": (1, 2, 4), "72b": (1, 2, 4, 8)}
PARAMETERS = {"2b": 2_208_985_600, "7b": 8_291_375_616, "72b": 73_405_560_320}


def load(
    folder: Path, parallel: TensorParallel | None = None, dtype: torch.dtype = torch.float32
) -> Qwen2VL:
    config = ModelConfig.from_dir(folder)
    model = Qwen2VL(config, parallel or TensorParallel(), dtype)
    load_weights(model, folder, config, CPU)
    return model


def parameters(model: Qwen2VL) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def rewrite(folder: Path, change: str, tensor: torch.Tensor | None, file: str = "") -> None:
    """Replaces (or drops, with None) the tensor `change` of a single-file checkpoint."""
    path = folder / (file or "model.safetensors")
    tensors = load_file(path)
    if tensor is None:
        del tensors[change]
    else:
        tensors[change] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize("name", REAL)
def test_real_configs_expect_exactly_the_real_tensors(name: str) -> None:
    raw = json.loads((DATA / f"config-{name}.json").read_text())
    model = Qwen2VL(ModelConfig.from_dict(raw), TensorParallel(), torch.bfloat16)
    wanted = {each.name: each.shape for each in model.weight_loaders()}
    assert wanted == dict(checkpoint_shapes(raw))
    assert model.weight_bytes == 2 * PARAMETERS[name]


Box = tuple[tuple[int, int], ...]  # [start, stop) along each axis


def box_of(part: WeightLoader) -> Box:
    """What of the checkpoint's tensor a part takes."""
    cuts = (*part.source, *(slice(None),) * (len(part.shape) - len(part.source)))
    pairs = zip(cuts, part.shape, strict=True)
    return tuple(cut.indices(size)[:2] for cut, size in pairs)


def tiles(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes, which differ along one axis at most, cover a tensor without gap or overlap."""
    whole = tuple((0, size) for size in shape)
    axes = [axis for axis in range(len(shape)) if any(box[axis] != whole[axis] for box in boxes)]
    if not axes:
        return boxes == [whole]
    (axis,) = axes
    edges = sorted(box[axis] for box in boxes)
    follows = all(left[1] == right[0] for left, right in itertools.pairwise(edges))
    return follows and edges[0][0] == 0 and edges[-1][1] == shape[axis]


@pytest.mark.parametrize(("name", "size"), [(n, s) for n in REAL for s in SIZES[n]])
def test_l14_tp_only_shards_tile_the_checkpoint_exactly(name: str, size: int) -> None:
    """On meta tensors. Each tensor once over all ranks: but vision and norms on every rank, and K
    and V as often as ranks outnumber their heads. And what arrives on a rank fills each of its
    parameters without gap or overlap."""
    raw = json.loads((DATA / f"config-{name}.json").read_text())
    config = ModelConfig.from_dict(raw)
    held: dict[str, list[Box]] = {}
    for rank in range(size):
        model = Qwen2VL(config, TensorParallel(rank, size), torch.bfloat16)
        filled: dict[int, tuple[torch.nn.Parameter, list[Box]]] = {}
        for part in model.weight_loaders():
            taken = torch.empty(part.shape, device="meta")[part.source]
            param = getattr(part.owner, part.attribute)
            assert param.is_meta and param.data[part.rows].numel() == taken.numel(), part.name
            held.setdefault(part.name, []).append(box_of(part))
            rows = part.rows.indices(param.shape[0])[:2]
            filled.setdefault(id(param), (param, []))[1].append((rows,))
        assert len(filled) == len(list(model.parameters()))
        assert all(tiles(boxes, param.shape[:1]) for param, boxes in filled.values())
    copies = max(1, size // config.num_key_value_heads)
    for tensor, shape in checkpoint_shapes(raw):
        if tensor.startswith("visual.") or "norm" in tensor:
            times = size
        else:
            times = copies if ".k_proj" in tensor or ".v_proj" in tensor else 1
        counts = Counter(held.pop(tensor))
        assert set(counts.values()) == {times}, tensor
        assert tiles(list(counts), shape), tensor
    assert not held


@pytest.mark.parametrize(
    "form",
    [{"nested_names": True}, {"nested_config": True}, {"shards": 3, "nested_names": True}],
    ids=["nested_names", "nested_config", "shards"],
)
def test_every_form_loads_the_same_weights(form: dict[str, object], tmp_path: Path) -> None:
    plain = parameters(load(write_tiny_checkpoint(tmp_path / "plain")))
    other = parameters(load(write_tiny_checkpoint(tmp_path / "other", **form)))  # type: ignore[arg-type]
    assert plain.keys() == other.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
def test_dtypes_are_converted(stored: str, served: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, dtype=stored)
    model = load(folder, dtype=getattr(torch, served))
    expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    found = model.decoder.embed_tokens.weight
    assert torch.equal(found, expected.to(getattr(torch, served)))


def test_a_tied_head_may_be_stored_all_the_same(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tied=True)
    rewrite(folder, "lm_head.weight", torch.zeros(288, 64))
    model = load(folder)
    assert model.decoder.head.weight.weight is model.decoder.embed_tokens.weight
    assert model.decoder.embed_tokens.weight.any()


def test_missing_tensor_is_named_with_its_shape(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    rewrite(folder, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj.* \[128, 64\]"):
        load(folder)


def test_extra_tensor_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    rewrite(folder, "model.layers.7.self_attn.g_idx", torch.zeros(3))
    with pytest.raises(ConfigError, match=r"layers\.7\.self_attn\.g_idx \[3\] \(model.safetensors"):
        load(folder)


def test_misshapen_tensor_is_named_with_both_shapes_before_anything_is_read(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, nested_names=True)
    rewrite(folder, "model.visual.merger.mlp.2.bias", torch.zeros(60))
    config = ModelConfig.from_dir(folder)
    model = Qwen2VL(config, TensorParallel(), torch.float32)
    message = r"model\.visual\.merger\.mlp\.2\.bias in .*model.safetensors: shape \[60\].* \[64\]"
    with pytest.raises(ConfigError, match=message):
        load_weights(model, folder, config, CPU)
    assert all(param.is_meta for param in model.parameters())


def test_other_dtypes_are_rejected(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    rewrite(folder, "model.norm.weight", torch.zeros(64, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight .*dtype I8"):
        load(folder)


def test_broken_and_absent_files(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "shards", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"00002-of-00002.safetensors: not readable"):
        load(folder)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"00002-of-00002.safetensors: no such file"):
        load(folder)
    with pytest.raises(ConfigError, match="no weights"):
        stored_tensors(tmp_path)


def test_l25_torch_load_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin.*safetensors"):
        stored_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_rejected(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, shards=2)
    name = next(iter(load_file(folder / "model-00001-of-00002.safetensors")))
    rewrite(folder, nested_name(name), torch.zeros(3), "model-00002-of-00002.safetensors")
    with pytest.raises(ConfigError, match="duplicate tensor, in"):
        load(folder)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, shards=3)
    config = ModelConfig.from_dir(folder)
    model = Qwen2VL(config, TensorParallel(), torch.float32)
    seen: list[tuple[int, int]] = []
    load_weights(model, folder, config, CPU, lambda done, total: seen.append((done, total)))
    dones = [done for done, _ in seen]
    assert dones == sorted(dones)
    assert seen[-1] == (model.weight_bytes, model.weight_bytes)


def test_names_of_both_forms() -> None:
    for name, _ in checkpoint_shapes(json.loads((DATA / "config-7b.json").read_text())):
        assert canonical_name(nested_name(name)) == name == canonical_name(name)


@pytest.mark.parametrize(("name", "sizes"), list(SIZES.items()))
def test_other_rank_counts_are_rejected_with_the_valid_ones(
    name: str, sizes: tuple[int, ...]
) -> None:
    config = ModelConfig.from_dict(json.loads((DATA / f"config-{name}.json").read_text()))
    assert valid_tensor_parallel_sizes(config) == sizes
    for size in sizes:
        check_tensor_parallel_size(config, size)
    for other in {0, 3, 5, 6, 7, 8, 12, 16, 64} - set(sizes):
        words = f"tensor_parallel_size={other}: .*supports sizes {', '.join(map(str, sizes))}$"
        with pytest.raises(ConfigError, match=words):
            Qwen2VL(config, TensorParallel(0, other), torch.float32)


@pytest.mark.parametrize("name", REAL)
def test_l14_tp_only_every_query_head_meets_its_own_kv_head(name: str) -> None:
    config = ModelConfig.from_dict(json.loads((DATA / f"config-{name}.json").read_text()))
    group = config.num_attention_heads // config.num_key_value_heads
    for size in valid_tensor_parallel_sizes(config):
        heads = config.num_attention_heads // size
        for rank in range(size):
            kept = kv_heads_of_rank(config, TensorParallel(rank, size))
            assert len(kept) == num_kv_heads_per_rank(config, size)
            for head in range(heads):
                meets = kept[head // (heads // len(kept))]
                assert meets == (rank * heads + head) // group


@pytest.mark.parametrize(("total", "size"), [(8960, 4), (100, 7)])
def test_shards_have_neither_gap_nor_overlap(total: int, size: int) -> None:
    shards = [TensorParallel(rank, size).shard(total) for rank in range(size)]
    assert [s.start for s in shards] == [0] + [s.stop for s in shards[:-1]]
    assert shards[-1].stop == total


def test_dtype_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", torch.device("cuda"), "bfloat16") == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda"), "float32") == torch.float32
    monkeypatch.setattr(loader, "cpu_multiplies_bf16", lambda: True)
    assert resolve_dtype("auto", CPU, "float16") == torch.bfloat16
    monkeypatch.setattr(loader, "cpu_multiplies_bf16", lambda: False)
    assert resolve_dtype("auto", CPU, "bfloat16") == torch.float32
    assert resolve_dtype("float16", CPU, "bfloat16") == torch.float16
    with pytest.raises(ConfigError, match="dtype='int8'"):
        resolve_dtype("int8", CPU, "float32")


MEASURE = """
import sys
from pathlib import Path
from typing import Any
import torch
torch.set_num_threads(1)
from octavo.engine.config.engine_config import ModelConfig
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.model.qwen2_vl import Qwen2VL
from octavo.engine.model.weights import WeightLoader
from octavo.engine.runner.loader import load_weights

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return (found["RssAnon"] + found["RssShmem"]) * 1024

folder, dtype, size = Path(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
config = ModelConfig.from_dir(folder)
load_weights(Qwen2VL(config, TensorParallel(0, size), dtype), folder, config, torch.device("cpu"))
before, peak = held(), 0  # once the libraries have taken what they keep
def watch(done, total):
    global peak
    peak = max(peak, held())
model = Qwen2VL(config, TensorParallel(0, size), dtype)
load_weights(model, folder, config, torch.device("cpu"), watch)
print((max(peak, held()) - before) / model.weight_bytes)
"""


@pytest.mark.parametrize(
    ("stored", "served", "size"),
    [
        ("bfloat16", "bfloat16", 1),
        ("bfloat16", "float32", 1),
        ("bfloat16", "bfloat16", 2),
        ("float16", "float16", 1),
    ],
)
def test_no_second_copy_of_the_weights_exists(
    stored: str, served: str, size: int, tmp_path: Path
) -> None:
    """Anonymous and shared memory that loading adds, as a share of the weights it leaves."""
    folder = write_tiny_checkpoint(
        tmp_path, layers=6, heads=16, kv_heads=4, head_dim=64, vision_layers=6, vision_heads=8,
        vision_head_dim=64, vocab_size=4000, shards=2, dtype=stored,
    )  # fmt: skip
    arguments = [sys.executable, "-P", "-c", MEASURE, str(folder), served, str(size)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    made = subprocess.run(arguments, capture_output=True, text=True, check=True, env=env)
    share = float(made.stdout)
    assert share < 1.15
    if served == "float16":  # it is not packed: what is not merged stays in the mapped file
        assert share < 0.8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vision_config": None}, "vision_config"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"text_config": 5}, "text_config=5 must be an object"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": 5}}, "rope_scaling.mrope_section=5"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer from 1 to"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"vision_token_id": 99_999_999}, "99999999"),
    ],
    ids=str,
)
def test_a_config_that_is_none_says_why(change: dict[str, Any], words: str) -> None:
    """None takes a field away."""
    text = (Path(__file__).parents[1] / "data/config-2b.json").read_text()
    raw = {**json.loads(text), **change}
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict({name: value for name, value in raw.items() if value is not None})


@pytest.mark.lesson("L08")
def test_worst_case_profile_a_gpu_keeps_memory_for_a_step() -> None:
    """Weights, KV blocks and the bound on a step's own needs fit the share of the GPU."""
    config = ModelConfig.from_dict(
        json.loads((Path(__file__).parents[1] / "data/config-7b.json").read_text())
    )
    asked = EngineConfig(max_model_len=4096, max_num_seqs=4096)
    weights, total = 16_600_000_000, 24 << 30
    block = kv_block_bytes(config, 1, asked.block_size, torch.bfloat16)
    memory = GroupMemory(weights, total, total - weights, block, "bfloat16", "cuda")
    step = activation_bytes(config, 1, 2048, 16384, torch.bfloat16)
    num_blocks, _ = plan_capacity(asked, config, memory)
    assert step > 1 << 30
    used = weights + num_blocks * block + step
    assert total * 0.9 - block <= used <= total * 0.9


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "config.json",
            '"num_hidden_layers": "four"',
            "num_hidden_layers='four' must be",
        ),
        ("config.json", '"model_type": "llama"', "config.json: model_type='llama'"),
        ("generation_config.json", '"top_p": "hot"', "generation_config.json: .*'hot'"),
        (
            "generation_config.json",
            '"eos_token_id": "x"',
            "generation_config.json: eos_token_id='x'",
        ),
        (
            "preprocessor_config.json",
            '"min_pixels": "y"',
            "config.json: min_pixels='y' must",
        ),
        ("preprocessor_config.json", None, "preprocessor_config.json: must be a JSON object"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(
    tmp_path: Path, name: str, text: str | None, told: str
) -> None:
    for file in EMBEDDED_MODEL.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    new: Any = [] if text is None else found | json.loads("{" + text + "}")
    (tmp_path / name).write_text(json.dumps(new))
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_dir(tmp_path)
        PreprocessConfig.from_dir(tmp_path)
        generation_defaults(tmp_path)
