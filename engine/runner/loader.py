"""Load safetensors checkpoints: memory-mapped, validated first, only this rank's bytes.

Other formats are not read, since they may contain code (pickle).
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
FLOATS = ("BF16", "F16", "F32")  # converted on loading; other dtypes must match exactly
EXACT = {torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_NAMED = 5  # missing or extra tensors listed in an error

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as described by its file's header."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPE_BYTES.get(self.dtype, 0)


def resolve_dtype(name: str, device: torch.device, checkpoint_dtype: str) -> torch.dtype:
    """Return the dtype to run the model in.

    "auto" selects the checkpoint's dtype on a GPU. On a CPU it selects bfloat16 if the CPU has
    bfloat16 products (AMX or AVX512-BF16), else float32. Raises ConfigError for unknown names.
    """
    if name == "auto" and device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    chosen = checkpoint_dtype if name == "auto" else name
    if chosen not in DTYPES:
        raise ConfigError(f"dtype={chosen!r}: must be auto, {', '.join(DTYPES)}")
    return DTYPES[chosen]


def resolve_quantization(name: str, device: torch.device) -> str | None:
    """Return the type to quantize weights to on loading; None for "".

    Raises ConfigError if the device does not support it.
    """
    if name and device.type != "cpu":
        raise ConfigError(
            f"quantization={name!r}: only supported on CPUs; remove it on {device.type}"
        )
    return name or None


def resolve_kv_cache_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the KV cache; `dtype` for "auto" or "".

    Raises ConfigError for other values on a CPU.
    """
    if name in ("", "auto"):
        return dtype
    if device.type == "cpu":
        raise ConfigError(f"kv_cache_dtype={name!r}: only supported on GPUs; remove it on cpu")
    return FP8


def check_weight_format(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError if a GPU does not support the checkpoint's quantized weights.

    A CPU dequantizes them.
    """
    stored = config.weight_format
    if stored is None or device.type == "cpu":
        return
    if stored.bits == 8:
        try:
            check_fp8(device)
        except ValueError as error:
            raise ConfigError(f"{stored.label}: {error}") from None
    elif dtype == torch.float32:
        raise ConfigError("dtype=float32: 4-bit weights require bfloat16 or float16")
    elif stored.group_size not in GROUPS and stored.group_size % max(GROUPS):
        raise ConfigError(
            f"group_size={stored.group_size}: must be 64 or a multiple of 128 on a GPU"
        )


def cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has bfloat16 products (AMX or AVX512-BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return False
    return any(f" {flag}" in flags for flag in ("amx_bf16", "avx512_bf16"))


def canonical_name(name: str) -> str:
    """Return a tensor's older, flat name: `model.layers...`, `visual...`, `lm_head.weight`."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """Return a checkpoint folder's safetensors files. Raises ConfigError if there are none."""
    files = indexed_files(folder)
    if not files and (folder / "model.safetensors").exists():
        files = (folder / "model.safetensors",)
    elif not files:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {others[0]}, which may contain code" if others else "no weights"
        raise ConfigError(f"{folder}: {found}; provide the weights as safetensors files")
    return files


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a checkpoint by canonical name, from the files' headers.

    Raises ConfigError for unreadable files and duplicate names.
    """
    found: dict[str, StoredTensor] = {}
    for file in checkpoint_files(folder):
        for name, (shape, dtype) in _header(file).items():
            tensor = StoredTensor(file, name, shape, dtype)
            other = found.setdefault(canonical_name(name), tensor)
            if other is not tensor:
                raise ConfigError(f"{name}: duplicate tensor, in {other.file} and {file}")
    return found


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        check_regular_file(file)  # opening a pipe would block forever
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: (tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; the checkpoint is incomplete") from None
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: mapping failed
        raise ConfigError(f"{file}: not readable as safetensors: {error}") from None


def check_tensors(
    wanted: dict[str, WeightLoader], found: dict[str, StoredTensor], config: ModelConfig
) -> None:
    """Raise ConfigError for missing, extra or misshapen tensors, or unsupported dtypes.

    A stored LM head of a tied checkpoint, and rotary tables of old writers, are ignored.
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
            f"the checkpoint has tensors that its config.json does not define: {_some(extra)}"
        )
    for name, part in wanted.items():
        tensor = found[name]
        if tensor.shape != part.shape and (tensor.shape, part.shape) != ((1,), ()):
            raise ConfigError(
                f"{tensor.stored_name} in {tensor.file}: shape {list(tensor.shape)}, "
                f"but config.json requires {list(part.shape)}"
            )
        exact = EXACT.get(getattr(part.owner, part.attribute).dtype)
        served = FLOATS if exact is None else (exact,)
        if tensor.dtype not in served:
            raise ConfigError(
                f"{tensor.stored_name} in {tensor.file}: dtype {tensor.dtype}; "
                f"must be {' or '.join(served)}"
            )


def drop_gptq_extras(
    wanted: Collection[str], found: dict[str, StoredTensor], config: ModelConfig
) -> None:
    """Remove tensors that GPTQ packers add and that are not needed.

    These are a `g_idx` in order, and a bias of zeros; both are read to verify that. Raises
    ConfigError if a layer's `g_idx` is missing or not in order.
    """
    stored = config.weight_format
    if stored is None or stored.method != "gptq":
        return
    for name in [name for name in wanted if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        g_idx, bias = found.pop(f"{layer}.g_idx", None), f"{layer}.bias"
        if g_idx is None and stored.reordered:
            raise ConfigError(f"the checkpoint lacks {layer}.g_idx, which desc_act=true requires")
        if g_idx is not None and not in_order(_read(g_idx), stored.group_size):
            raise ConfigError(
                f"{g_idx.stored_name} in {g_idx.file}: inputs are not in group order; "
                "only desc_act=false is supported"
            )
        if bias not in wanted and bias in found:
            if _read(found[bias]).any():
                continue  # `check_tensors` reports it as extra
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
    """Return loaders and stored tensors, by canonical name, from headers only.

    Raises ConfigError if files and configuration do not match.
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
    """Load every weight of `model` on `device` from the checkpoint in `folder`.

    All headers are checked before the first byte is copied. Parameters are allocated when their
    first part arrives, parts are copied directly from the mapped file, and a layer is packed after
    its last part, so that there is never a second copy of all weights.
    `on_progress(done_bytes, total_bytes)` is called after every tensor. Raises ConfigError if the
    checkpoint is invalid.
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
        for name, parts in loaders.items():  # in layer order, across files
            stored = opened[found[name].file].get_slice(found[name].stored_name)
            for part in parts:
                part.load(stored[part.source], device)
                _count_part(part.owner, parts_left, quantization)
            done += found[name].nbytes
            if on_progress is not None:
                on_progress(done, total)
    model.place(device)


def _count_part(owner: nn.Module, parts_left: Counter[int], quantization: str | None) -> None:
    """Count a loaded part; finish its module after the last one."""
    parts_left[id(owner)] -= 1
    if parts_left[id(owner)] == 0 and isinstance(owner, LinearWeight | VocabParallelEmbedding):
        owner.finish(quantization)
