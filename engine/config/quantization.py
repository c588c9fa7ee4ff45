"""Quantization of a checkpoint's decoder weights, from `quantization_config` in its config.json.

Supported are 4-bit AWQ and GPTQ, and FP8 (e4m3) with a scale per tensor or output channel. Only
linear layers of the decoder are quantized, except those that the config leaves dense. Vision tower,
embedding and head are dense, as in Qwen's own checkpoints.
Sources: the configs of AutoAWQ, AutoGPTQ, AutoFP8 and compressed-tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import ConfigError

METHODS = ("awq", "gptq", "fp8", "compressed-tensors")
DENSE_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore")  # fields with dense modules
PATTERN = "re:"  # starts an entry that is a regular expression
REPEAT = re.compile(r"[*+{]")
MAX_NAMES, MAX_NAME_LENGTH = 4096, 256  # of one list
MAX_PATTERNS, MAX_REPEATS = 16, 3
PARENTS = ("model", "model.language_model")  # of `layers`, in older and newer checkpoints
MERGED = (  # linear layers of a decoder layer, grouped as they are merged into one product
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class WeightFormat:
    """Format of the linear layers of a quantized decoder."""

    method: str  # one of METHODS
    group_size: int = 0  # 4 bits: inputs that share a scale; 0: 8 bits
    reordered: bool = False  # GPTQ's desc_act: g_idx has the group of each input
    per_channel: bool = False  # FP8: one scale per output instead of one per tensor
    static_scale: bool = False  # FP8: the activations' scale is in the checkpoint
    dense: frozenset[str] = frozenset()  # dense layers, such as "0.mlp.down_proj"

    def of(self, layer: int, name: str) -> WeightFormat | None:
        """Return the format of linear layer `name` in decoder layer `layer`; None: dense."""
        return None if f"{layer}.{name}" in self.dense else self

    @property
    def bits(self) -> int:
        return 4 if self.group_size else 8

    @property
    def label(self) -> str:
        """Description for the log."""
        groups = f"int4, groups of {self.group_size}" if self.group_size else "e4m3"
        some = f", {len(self.dense)} layers dense" if self.dense else ""
        return f"{self.method} ({groups}{some})"


def read_weight_format(raw: dict[str, Any] | None, num_layers: int) -> WeightFormat | None:
    """Return the format in `quantization_config`; None without one.

    Raises `ConfigError` naming the unsupported field, its value and the supported values.
    """
    if not raw:
        return None
    _mapping(raw, "")
    read = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors}
    method = _served(raw, "quant_method", METHODS)
    return replace(read[method](raw), dense=_dense_layers(raw, num_layers))


def _served(raw: dict[str, Any], name: str, served: tuple[Any, ...], where: str = "") -> Any:
    """Return the field's value, None if absent. Raises `ConfigError` unless it is in `served`."""
    value = raw.get(name)
    if value in served:
        return value
    names = " or ".join(dict.fromkeys(repr(each) for each in served if each is not None))
    valid = f"must be {names}" if names else "is not supported; must be absent"
    raise ConfigError(f"quantization_config: {where}{name}={value!r}: {valid}")


def _mapping(value: Any, field: str) -> dict[str, Any]:
    """Return a JSON object. Raises `ConfigError` for any other value."""
    if isinstance(value, dict):
        return value
    where = f"{field}=" if field else ""
    raise ConfigError(f"quantization_config: {where}{truncated_repr(value)}: must be an object")


def _group_size(raw: dict[str, Any]) -> int:
    size = raw.get("group_size")
    if type(size) is int and size > 0:
        return size
    raise ConfigError(
        f"quantization_config: group_size={size!r}: must be a positive integer, such as 128"
    )


def _awq(raw: dict[str, Any]) -> WeightFormat:
    _served(raw, "bits", (4,))
    _served({"version": str(raw.get("version", "gemm")).lower()}, "version", ("gemm",))
    _served(raw, "zero_point", (True,))
    return WeightFormat("awq", _group_size(raw))


def _gptq(raw: dict[str, Any]) -> WeightFormat:
    """Read a GPTQ config. `sym` is ignored, since the zeros are always read."""
    _served(raw, "bits", (4,))
    _served(raw, "checkpoint_format", ("gptq", None))  # gptq_v2 stores zeros without offset
    _served(raw, "lm_head", (False, None))
    _served(raw, "is_marlin_format", (False, None))
    _served(raw, "dynamic", ({}, None))
    reordered = _served(raw, "desc_act", (False, True, None))
    return WeightFormat("gptq", _group_size(raw), reordered=bool(reordered))


def _fp8(raw: dict[str, Any]) -> WeightFormat:
    scheme = _served(raw, "activation_scheme", ("dynamic", "static"))
    _served(raw, "weight_block_size", (None,))
    _served(raw, "fmt", ("e4m3", None))
    return WeightFormat("fp8", static_scale=scheme == "static")


def _compressed_tensors(raw: dict[str, Any]) -> WeightFormat:
    _served(raw, "format", ("float-quantized",))
    _served(raw, "quantization_status", ("compressed", "frozen", None))
    _served(raw, "kv_cache_scheme", (None,))
    sparsity = _mapping(raw.get("sparsity_config") or {}, "sparsity_config")
    _served(sparsity, "format", ("dense", None), "sparsity_config.")
    groups = _mapping(raw.get("config_groups") or {}, "config_groups")
    if len(groups) != 1:
        raise ConfigError(
            f"quantization_config: config_groups={list(groups)}: must have exactly one group"
        )
    ((name, group),) = groups.items()
    where = f"config_groups.{name}."
    _mapping(group, f"config_groups.{name}")
    _served(group, "targets", (["Linear"],), where)
    _served(group, "output_activations", (None,), where)
    _served(group, "format", ("float-quantized", None), where)
    weights = _e4m3(group, "weights", where)
    place = f"{where}weights."
    _served(weights, "dynamic", (False, None), place)
    strategy = _served(weights, "strategy", ("channel", "tensor"), place)
    inputs = _e4m3(group, "input_activations", where)
    place = f"{where}input_activations."
    dynamic = _served(inputs, "dynamic", (True, False), place)
    _served(inputs, "strategy", ("token" if dynamic else "tensor",), place)
    return WeightFormat(
        "compressed-tensors", per_channel=strategy == "channel", static_scale=not dynamic
    )


def _e4m3(group: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    part = group.get(name)
    if not isinstance(part, dict):
        raise ConfigError(
            f"quantization_config: {where}{name}={part!r}: must be an object for 8-bit FP8"
        )
    place = f"{where}{name}."
    _served(part, "num_bits", (8,), place)
    _served(part, "type", ("float",), place)
    _served(part, "symmetric", (True, None), place)
    return part


def _names(raw: dict[str, Any], field: str) -> list[str]:
    """Return a list of names. Raises `ConfigError` for any other value."""
    names = raw.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        text = f"{field}={truncated_repr(names)}: must be a list of names"
        raise ConfigError(f"quantization_config: {text}")
    patterns = [name for name in names if name.startswith(PATTERN)]
    if len(names) > MAX_NAMES or len(patterns) > MAX_PATTERNS:
        text = f"{field}: {len(names)} names, {len(patterns)} of them regular expressions"
        raise ConfigError(f"quantization_config: {text}; at most {MAX_NAMES} and {MAX_PATTERNS}")
    for name in names:
        if len(name) > MAX_NAME_LENGTH or (name in patterns and _may_be_slow(name)):
            text = f"{field} has {truncated_repr(name)}: at most {MAX_NAME_LENGTH} characters, and "
            text += f"{MAX_REPEATS} repetitions of a regular expression, none of a group"
            raise ConfigError(f"quantization_config: {text}")
    return names


def _may_be_slow(pattern: str) -> bool:
    """Return whether a regular expression may take long: Python's engine backtracks."""
    plain = re.sub(r"\\.", "x", pattern)  # without escapes
    return (
        ")*" in plain or ")+" in plain or "){" in plain or len(REPEAT.findall(plain)) > MAX_REPEATS
    )


def _dense_layers(raw: dict[str, Any], num_layers: int) -> frozenset[str]:
    """Return the decoder's linear layers that the config leaves dense.

    Raises `ConfigError` if only some of the layers that are merged into one product are dense.
    """
    entries = [(field, name) for field in DENSE_LISTS for name in _names(raw, field)]
    dense: set[str] = set()
    for layer in range(num_layers) if entries else ():
        for names in MERGED:
            left = {name for name in names if _is_dense(entries, f"layers.{layer}.{name}")}
            if len(left) not in (0, len(names)):
                part, rest = sorted(left)[0], sorted({*names} - left)[0]
                raise ConfigError(
                    f"quantization_config: in layer {layer} {part} is dense and {rest} is not; "
                    f"{', '.join(names)} are one product, so all or none of them must be dense"
                )
            dense |= {f"{layer}.{name}" for name in left}
    return frozenset(dense)


def _is_dense(entries: list[tuple[str, str]], name: str) -> bool:
    names = [f"{parent}.{name}" for parent in PARENTS]
    return any(_covers(field, entry, each) for field, entry in entries for each in names)


def _covers(field: str, entry: str, name: str) -> bool:
    """Return whether an entry of a list of dense modules matches a module's name.

    An entry "re:..." is a regular expression for the start of the name. In AWQ's list, an entry
    matches any substring; in the others, one or more components of the path.
    """
    if not entry.startswith(PATTERN):
        return entry in name if field == DENSE_LISTS[0] else f".{entry}." in f".{name}."
    try:
        return re.match(entry.removeprefix(PATTERN), name) is not None
    except re.error as error:
        raise ConfigError(
            f"quantization_config: {field} has {entry!r}: not a valid regular expression ({error})"
        ) from None
