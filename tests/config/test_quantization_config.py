"""`quantization_config` of an untrusted checkpoint: wrong types, and work that is not bounded."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.engine.config.quantization import read_weight_format
from octavo.engine.errors import ConfigError

FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
GROUP = {
    "targets": ["Linear"],
    "weights": {**FLOAT8, "dynamic": False, "strategy": "channel"},
    "input_activations": {**FLOAT8, "dynamic": True, "strategy": "token"},
}
VALID = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": GROUP},
}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True}


@pytest.mark.lesson("L16")
@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("awq", "'awq': must be an object"),
        ([1], "must be an object"),
        ({**VALID, "config_groups": [1]}, "config_groups=.*must be an object"),
        ({**VALID, "config_groups": {"g": "x"}}, "config_groups.g='x': must be an object"),
        ({**VALID, "sparsity_config": "x"}, "sparsity_config='x': must be an object"),
        ({**AWQ, "group_size": True}, "group_size=True"),
        ({**VALID, "ignore": ["x"] * 5000}, "ignore: 5000 names"),
        ({**VALID, "ignore": ["re:.*x"] * 17}, "17 of them regular expressions"),
        ({**VALID, "ignore": ["re:(([a-z0-9_.])+)+!"]}, "none of a group"),
        ({**VALID, "ignore": ["re:.*.*.*.*x"]}, "3 repetitions"),
        ({**VALID, "ignore": ["x" * 257]}, "256 characters"),
    ],
)
def test_invalid_quantization_is_named(raw: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_weight_format(raw, 28)


def test_usual_lists_are_read() -> None:
    names = ["lm_head", "re:.*lm_head", "re:visual.*", r"re:model\.layers\.0\.mlp\.(gate|up)_proj"]
    found = read_weight_format({**VALID, "ignore": names}, 28)
    assert found is not None and found.dense == {"0.mlp.gate_proj", "0.mlp.up_proj"}
