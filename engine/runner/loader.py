"""Puts a checkpoint's safetensors into a model: mapped, checked first, only this rank's bytes.

Nothing but safetensors is read: other formats hold code (pickle).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ...kernels.fp8_linear import FP8, check_fp8
from ...kernels.int4_layout import GROUPS, in_order
from ..config.engine_config import ModelConfig
from ..config.json_files import check_regular_file, indexed_files
from ..errors import ConfigError
from ..model.layers import VocabParallelEmbedding
from ..model.quantized import LinearWeight
from ..model.qwen2_vl import Qwen2VL
from ..model.weights import WeightLoader

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}  # safetensors' names
FLOATS = ("BF16", "F16", "F32")  # are converted; others are served where a weight is just of those
EXACT = {torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_NAMED = 5  # of missing or extra tensors, in one error

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header states it."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPE_BYTES.get(self.dtype, 0)


def resolve_dtype(name: str, device: torch.device, checkpoint_dtype: str) -> torch.dtype:
    """The dtype to serve in. "auto": the checkpoint's on a GPU; on a CPU bfloat16 where the CPU
    multiplies it (AMX or AVX512-BF16), else float32. Raises ConfigError for other names.
    """
    if name == "auto" and device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    chosen = checkpoint_dtype if name == "auto" else name
    if chosen not in DTYPES:
        raise ConfigError(f"dtype={chosen!r}: must be auto, {', '.join(DTYPES)}")
    return DTYPES[chosen]


def resolve_quantization(name: str, device: torch.device) -> str | None:
    """What weights are quantised to on loading; "" is nothing. Raises ConfigError where `device`
    has no product for it."""
    if name and device.type != "cpu":
        raise ConfigError(f"quantization={name!r}: is for CPUs; leave it out on {device.type}")
    return name or None


def resolve_kv_cache_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What the KV cache holds; "auto" (or "") is `dtype`. Raises ConfigError for a CPU."""
    if name in ("", "auto"):
        return dtype
    if device.type == "cpu":
        raise ConfigError(f"kv_cache_dtype={name!r}: is for GPUs; leave it out on cpu")
    return FP8


def check_weight_format(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where a GPU has no product for the checkpoint's quantised weights. A CPU
    makes dense ones of them."""
    stored = config.weight_format
    if stored is None or device.type == "cpu":
        return
    if stored.bits == 8:
        try:
            check_fp8(device)
        except ValueError as error:
            raise ConfigError(f"{stored.label}: {error}") from None
    elif dtype == torch.float32:
        raise ConfigError("dtype=float32: four-bit weights are served in bfloat16 or float16")
    elif stored.group_size not in GROUPS and stored.group_size % max(GROUPS):
        raise ConfigError(
            f"group_size={stored.group_size}: on a GPU 64 and multiples of 128 are served"
        )


def cpu_multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return False
    return any(f" {flag}" in flags for flag in ("amx_bf16", "avx512_bf16"))


def canonical_name(name: str) -> str:
    """The older, flat name of a tensor: `model.layers...`, `visual...`, `lm_head.weight`."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint folder. Raises ConfigError where there are none."""
    files = indexed_files(folder)
    if not files and (folder / "model.safetensors").exists():
        files = (folder / "model.safetensors",)
    elif not files:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {others[0]}, which may run code when read" if others else "no weights"
        raise ConfigError(f"{folder}: {found}; weights are read from safetensors files alone")
    return files


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its canonical name, from the files' headers."""
    found: dict[str, StoredTensor] = {}
    for file in checkpoint_files(folder):
        for name, (shape, dtype) in _header(file).items():
            tensor = StoredTensor(file, name, shape, dtype)
            other = found.setdefault(canonical_name(name), tensor)
            if other is not tensor:
                raise ConfigError(f"{name}: both in {other.file} and in {file}")
    return found


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        check_regular_file(file)  # opening a pipe would block forever
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: (tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; the checkpoint is not complete") from None
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: not to be mapped
        raise ConfigError(f"{file}: not readable as safetensors: {error}") from None


def check_tensors(
    wanted: dict[str, WeightLoader], found: dict[str, StoredTensor], config: ModelConfig
) -> None:
    """Raises ConfigError naming what is missing, extra, misshapen, or of a dtype not served.

    A tied head that is stored all the same is fine, and so are the rotary tables of old writers.
    """
    missing = [f"{n} {list(part.shape)}" for n, part in wanted.items() if n not in found]
    if missing:
        raise ConfigError(f"the checkpoint lacks {_some(missing)}")
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = [
        f"{tensor.stored_name} {list(tensor.shape)} ({tensor.file.name})"
        for name, tensor in found.items()
        if name not in wanted and name not in ignored and not name.endswith(".inv_freq")
    ]
    if extra:
        raise ConfigError(
            f"the checkpoint holds what its config.json has no place for: {_some(extra)}"
        )
    for name, part in wanted.items():
        tensor = found[name]
        if tensor.shape != part.shape and (tensor.shape, part.shape) != ((1,), ()):
            raise ConfigError(
                f"{tensor.stored_name} in {tensor.file}: shape {list(tensor.shape)}, "
                f"but config.json asks for {list(part.shape)}"
            )
        exact = EXACT.get(getattr(part.owner, part.attribute).dtype)
        served = FLOATS if exact is None else (exact,)
        if tensor.dtype not in served:
            raise ConfigError(
                f"{tensor.stored_name} in {tensor.file}: dtype {tensor.dtype}; "
                f"served are {', '.join(served)}"
            )


def drop_gptq_extras(
    wanted: Collection[str], found: dict[str, StoredTensor], config: ModelConfig
) -> None:
    """Takes out what GPTQ's packers add to a layer and no product needs, once it is read and seen
    to be so: a `g_idx` in order, and a bias of zeros. Raises ConfigError where it is not."""
    stored = config.weight_format
    if stored is None or stored.method != "gptq":
        return
    for name in [name for name in wanted if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        g_idx, bias = found.pop(f"{layer}.g_idx", None), f"{layer}.bias"
        if g_idx is None and stored.reordered:
            raise ConfigError(f"the checkpoint lacks {layer}.g_idx, and desc_act is true")
        if g_idx is not None and not in_order(_read(g_idx), stored.group_size):
            raise ConfigError(
                f"{g_idx.stored_name} in {g_idx.file}: its inputs are not in their groups' order; "
                "GPTQ is served with desc_act=false alone"
            )
        if bias not in wanted and bias in found:
            if _read(found[bias]).any():
                continue  # and `check_tensors` names it as one with no place
            del found[bias]


def _read(tensor: StoredTensor) -> torch.Tensor:
    with safe_open(tensor.file, framework="pt") as opened:
        return opened.get_tensor(tensor.stored_name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def check_checkpoint(
    model: Qwen2VL, folder: Path, config: ModelConfig
) -> tuple[dict[str, list[WeightLoader]], dict[str, StoredTensor]]:
    """Return where each tensor goes, and all tensors, by canonical name; from headers alone.

    Raises `ConfigError` where files and configuration do not fit together.
    """
    loaders: dict[str, list[WeightLoader]] = {}
    for loader in model.weight_loaders():
        loaders.setdefault(loader.name, []).append(loader)
    found = stored_tensors(folder)
    drop_gptq_extras(loaders, found, config)
    check_tensors({name: each[0] for name, each in loaders.items()}, found, config)
    return loaders, found


def load_weights(
    model: Qwen2VL,
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    on_progress: OnProgress | None = None,
    quantization: str | None = None,
) -> None:
    """Fills every weight of `model` on `device` from the checkpoint in `folder`.

    All headers are checked before the first byte is copied. Parameters are made when their first
    part arrives, parts are copied straight from the mapped file, and a layer is packed as soon as
    its last part is there, so no second copy of the weights exists at any time.
    `on_progress(done_bytes, total_bytes)` is called for every tensor.
    """
    loaders, found = check_checkpoint(model, folder, config)
    total = sum(found[name].nbytes for name in loaders)
    done = 0
    parts_left = Counter(id(each.owner) for parts in loaders.values() for each in parts)
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in checkpoint_files(folder)
        }
        for name, parts in loaders.items():  # layer by layer, whichever file it is in
            stored = opened[found[name].file].get_slice(found[name].stored_name)
            for part in parts:
                part.load(stored[part.source], device)
                _count_part(part.owner, parts_left, quantization)
            done += found[name].nbytes
            if on_progress is not None:
                on_progress(done, total)
    model.place(device)


def _count_part(owner: nn.Module, parts_left: Counter[int], quantization: str | None) -> None:
    """Finishes a module, where it has more to do, when its last part is there."""
    parts_left[id(owner)] -= 1
    if parts_left[id(owner)] == 0 and isinstance(owner, LinearWeight | VocabParallelEmbedding):
        owner.finish(quantization)
