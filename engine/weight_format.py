"""How a checkpoint's decoder weights are quantised, from `quantization_config` in its config.json.

Served: AWQ and GPTQ in four bits, FP8 (e4m3) with a scale for each tensor or output channel. Only
the decoder's linear layers are so; vision tower, embedding and head are dense, as in Qwen's own.
Sources: the configs of AutoAWQ, AutoGPTQ, AutoFP8 and compressed-tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .config_error import ConfigError

METHODS = ("awq", "gptq", "fp8", "compressed-tensors")
DENSE_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore")  # modules left as they were
QUANTISED = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class WeightFormat:
    """Of every linear layer of a checkpoint's decoder."""

    method: str  # one of METHODS
    group_size: int = 0  # inputs that share a scale, in four bits; 0: eight bits
    reordered: bool = False  # GPTQ's desc_act: g_idx says which group an input is of
    per_channel: bool = False  # FP8: a scale for each output, or one for the whole tensor
    static_scale: bool = False  # FP8: the activations' scale is in the checkpoint

    @property
    def bits(self) -> int:
        return 4 if self.group_size else 8

    @property
    def label(self) -> str:
        """For people."""
        groups = f"int4, groups of {self.group_size}" if self.group_size else "e4m3"
        return f"{self.method} ({groups})"


def read_weight_format(raw: dict[str, Any] | None, num_layers: int) -> WeightFormat | None:
    """The format that `quantization_config` states; None without one. Raises ConfigError naming the
    field that is not served, its value, and what is."""
    if not raw:
        return None
    method = _served(raw, "quant_method", METHODS)
    _check_dense_modules(raw, num_layers)
    if method == "awq":
        return _awq(raw)
    if method == "gptq":
        return _gptq(raw)
    return _fp8(raw) if method == "fp8" else _compressed_tensors(raw)


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


def _check_dense_modules(raw: dict[str, Any], num_layers: int) -> None:
    """Raises ConfigError where a layer of the decoder is to be left dense: either all are, or none.

    An entry is a part of a module's name, or after "re:" what its beginning must match.
    """
    names = [
        f"{parent}.layers.{layer}.{name}"
        for parent in ("model", "model.language_model")
        for layer in range(num_layers)
        for name in QUANTISED
    ]
    for field in DENSE_LISTS:
        for entry in raw.get(field) or ():
            touched = next((name for name in names if _covers(field, str(entry), name)), None)
            if touched:
                raise ConfigError(
                    f"quantization_config: {field} has {entry!r}, which leaves {touched} dense: "
                    "served are checkpoints with all of the decoder's linear layers quantised"
                )


def _covers(field: str, entry: str, name: str) -> bool:
    if not entry.startswith("re:"):
        return entry in name
    try:
        return re.match(entry.removeprefix("re:"), name) is not None
    except re.error as error:
        raise ConfigError(
            f"quantization_config: {field} has {entry!r}: no regular expression ({error})"
        ) from None
