"""How a checkpoint's decoder weights are quantised, from `quantization_config` in its config.json.

Served: AWQ and GPTQ in four bits, FP8 (e4m3) with a scale for each tensor or output channel. Only
the decoder's linear layers are so, or those of them that the config does not leave dense; vision
tower, embedding and head are dense, as in Qwen's own.
Sources: the configs of AutoAWQ, AutoGPTQ, AutoFP8 and compressed-tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError

METHODS = ("awq", "gptq", "fp8", "compressed-tensors")
DENSE_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore")  # modules left as they were
PARENTS = ("model", "model.language_model")  # of the layers, in older and newer checkpoints
MERGED = (  # layers of the decoder; those that are one product here
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class WeightFormat:
    """Of the linear layers of a checkpoint's decoder."""

    method: str  # one of METHODS
    group_size: int = 0  # inputs that share a scale, in four bits; 0: eight bits
    reordered: bool = False  # GPTQ's desc_act: g_idx says which group an input is of
    per_channel: bool = False  # FP8: a scale for each output, or one for the whole tensor
    static_scale: bool = False  # FP8: the activations' scale is in the checkpoint
    dense: frozenset[str] = frozenset()  # what was left as it was, as "0.mlp.down_proj"

    def of(self, layer: int, name: str) -> WeightFormat | None:
        """The format of a linear layer, by its name in decoder layer `layer`; None if dense."""
        return None if f"{layer}.{name}" in self.dense else self

    @property
    def bits(self) -> int:
        return 4 if self.group_size else 8

    @property
    def label(self) -> str:
        """For people."""
        groups = f"int4, groups of {self.group_size}" if self.group_size else "e4m3"
        some = f", {len(self.dense)} layers dense" if self.dense else ""
        return f"{self.method} ({groups}{some})"


def read_weight_format(raw: dict[str, Any] | None, num_layers: int) -> WeightFormat | None:
    """The format that `quantization_config` states; None without one. Raises ConfigError naming the
    field that is not served, its value, and what is."""
    if not raw:
        return None
    read = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors}
    method = _served(raw, "quant_method", METHODS)
    return replace(read[method](raw), dense=_dense_layers(raw, num_layers))


def _served(raw: dict[str, Any], name: str, served: tuple[Any, ...], where: str = "") -> Any:
    """The field's value, None where absent. Raises ConfigError unless it is one of `served`."""
    value = raw.get(name)
    if value in served:
        return value
    names = " or ".join(dict.fromkeys(repr(each) for each in served if each is not None))
    way = f"{names} is served" if names else "it must be left out"
    raise ConfigError(f"quantization_config: {where}{name}={value!r}: {way}")


def _group_size(raw: dict[str, Any]) -> int:
    size = raw.get("group_size")
    if isinstance(size, int) and size > 0:
        return size
    raise ConfigError(
        f"quantization_config: group_size={size!r}: a number of inputs is served, such as 128"
    )


def _awq(raw: dict[str, Any]) -> WeightFormat:
    _served(raw, "bits", (4,))
    _served({"version": str(raw.get("version", "gemm")).lower()}, "version", ("gemm",))
    _served(raw, "zero_point", (True,))
    return WeightFormat("awq", _group_size(raw))


def _gptq(raw: dict[str, Any]) -> WeightFormat:
    """`sym` may be either: the zeros are read all the same."""
    _served(raw, "bits", (4,))
    _served(raw, "checkpoint_format", ("gptq", None))  # of gptq_v2 zeros are stored as they are
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
    _served(raw.get("sparsity_config") or {}, "format", ("dense", None), "sparsity_config.")
    groups = raw.get("config_groups") or {}
    if len(groups) != 1:
        raise ConfigError(f"quantization_config: config_groups={list(groups)}: one is served")
    ((name, group),) = groups.items()
    where = f"config_groups.{name}."
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
            f"quantization_config: {where}{name}={part!r}: FP8 of eight bits is served"
        )
    place = f"{where}{name}."
    _served(part, "num_bits", (8,), place)
    _served(part, "type", ("float",), place)
    _served(part, "symmetric", (True, None), place)
    return part


def _names(raw: dict[str, Any], field: str) -> list[str]:
    """Raises ConfigError for what is no list of names."""
    names = raw.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"quantization_config: {field}={names!r}: must be a list of names")
    return names


def _dense_layers(raw: dict[str, Any], num_layers: int) -> frozenset[str]:
    """The decoder's linear layers that the config leaves dense. Raises ConfigError where that
    parts layers that are merged here."""
    entries = [(field, name) for field in DENSE_LISTS for name in _names(raw, field)]
    dense: set[str] = set()
    for layer in range(num_layers) if entries else ():
        for names in MERGED:
            left = {name for name in names if _is_dense(entries, f"layers.{layer}.{name}")}
            if len(left) not in (0, len(names)):
                part, rest = sorted(left)[0], sorted({*names} - left)[0]
                raise ConfigError(
                    f"quantization_config: in layer {layer} {part} is left dense and {rest} is "
                    f"not: {', '.join(names)} are one product, so all must be dense or none"
                )
            dense |= {f"{layer}.{name}" for name in left}
    return frozenset(dense)


def _is_dense(entries: list[tuple[str, str]], name: str) -> bool:
    names = [f"{parent}.{name}" for parent in PARENTS]
    return any(_covers(field, entry, each) for field, entry in entries for each in names)


def _covers(field: str, entry: str, name: str) -> bool:
    """Whether a module's name matches: after "re:" its beginning; by AWQ's list any part of it; by
    the others one of its modules, or a path of them."""
    if not entry.startswith("re:"):
        return entry in name if field == DENSE_LISTS[0] else f".{entry}." in f".{name}."
    try:
        return re.match(entry.removeprefix("re:"), name) is not None
    except re.error as error:
        raise ConfigError(
            f"quantization_config: {field} has {entry!r}: no regular expression ({error})"
        ) from None
