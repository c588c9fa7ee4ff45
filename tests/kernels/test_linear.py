"""Products with weights as they are held: plain, packed, and in eight bits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from octavo.kernels import linear as linear_module
from octavo.kernels.linear import (
    PACKED_ROWS,
    Int8Weight,
    PackedWeight,
    PanelWeight,
    by_rows,
    in_few_shapes,
    int8_linear_ref,
    linear,
    linear_ref,
    pack_weight,
    padded_rows,
    quantize_rows,
)

ROWS = (1, 3, 16, PACKED_ROWS, PACKED_ROWS + 1, 300)
SHAPES = ((96, 64), (130, 1176), (1536, 256))  # out, in


def tensors(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, shape[1]), torch.randn(shape) * shape[1] ** -0.5
    return [each.to(dtype) for each in (x, weight, torch.randn(shape[0]))]


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=["panels", "onednn"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who multiplies bfloat16 on a CPU."""
    if request.param == "onednn":
        monkeypatch.setattr(linear_module, "serves_panels", lambda weight: False)
    elif not linear_module.serves_panels(torch.ones(4, 4).bfloat16()):
        pytest.skip("oneDNN's form is the faster one here")
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_packed_products_are_the_plain_ones(rows: int, shape: tuple[int, int], form: str) -> None:
    x, weight, bias = tensors(rows, shape, torch.bfloat16)
    packed = pack_weight(weight)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert isinstance(packed, PanelWeight if form == "panels" else PackedWeight)
        assert packed.nbytes <= weight.nbytes + 15 * 2 * shape[1]
    for each in (None, bias):
        assert far(linear(x, packed, each), linear_ref(x, weight, each)) < 0.004


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    assert pack_weight(weight) is weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_products_are_those_of_the_rounded_numbers(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, form: str
) -> None:
    """And those are near the plain ones: rounding to eight bits costs about a hundredth."""
    x, weight, bias = tensors(rows, shape, dtype)
    held = pack_weight(weight, "int8")
    panels = form == "panels" and dtype == torch.bfloat16
    assert isinstance(held, PanelWeight if panels else Int8Weight)
    assert held.nbytes <= weight.numel() + 8 * shape[0] + 15 * shape[1]
    for each in (None, bias):
        found = linear(x, held, each)
        assert found.dtype == dtype
        rounding = 1e-5 if dtype == torch.float32 else 0.006
        assert far(found, int8_linear_ref(x, weight, each)) < rounding
        assert far(found, linear_ref(x, weight, each)) < 0.02


def test_int8_rows_have_scales_of_their_own() -> None:
    """A row of huge numbers costs the others nothing; zeros stay zeros."""
    x, weight, _ = tensors(4, (96, 64), torch.float32)
    x[1] *= 1e4
    x[2] = 0
    held = pack_weight(weight, "int8")
    found = linear(x, held)
    assert torch.equal(found[[0, 3]], linear(x[[0, 3]], held))
    assert not found[2].any()
    numbers, scale = quantize_rows(x)
    assert numbers.abs().amax(1).tolist() == [127, 127, 0, 127]
    assert torch.allclose(numbers * scale[:, None], x, atol=float(scale.max()) / 2, rtol=0)


def test_by_rows_is_the_same_in_pieces() -> None:
    seen: list[int] = []

    def layers(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x * 2

    x = torch.arange(300.0)[:, None]
    assert torch.equal(by_rows(layers, x), x * 2)
    assert seen == [PACKED_ROWS, PACKED_ROWS, 300 - 2 * PACKED_ROWS]


def test_rows_are_padded_to_few_counts() -> None:
    seen: set[int] = set()

    def product(x: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        return x * 2

    for count in range(2 * PACKED_ROWS + 20):
        x = torch.arange(3.0 * count).view(count, 3)
        assert torch.equal(in_few_shapes(product, x), x * 2)
    assert len(seen - {0}) == 12 and max(seen) == PACKED_ROWS
    assert all(padded_rows(count) - count < 16 for count in range(1, PACKED_ROWS + 1))


# Prints bytes of native memory that products of all row counts leave behind, for each weight.
KEPT_BYTES = """
import ctypes, json
import torch
from octavo.kernels import linear as module

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
module.serves_panels = lambda weight: False  # these products keep nothing
weight = torch.ones(256, 128)
packed = module.pack_weight(weight.bfloat16())
quantized = module.pack_weight(weight.bfloat16(), "int8")
half = weight.half()
cases = {
    "packed": lambda n: module.linear(torch.ones(n, 128, dtype=torch.bfloat16), packed),
    "int8": lambda n: module.linear(torch.ones(n, 128, dtype=torch.bfloat16), quantized),
    "float16": lambda n: module.linear(torch.ones(n, 128, dtype=torch.float16), half),
}
found = {}
with torch.inference_mode():
    for name, product in cases.items():
        product(3)
        before = libc.mallinfo2().uordblks
        for count in range(1, 161):
            product(count)
        found[name] = libc.mallinfo2().uordblks - before
print(json.dumps(found))
"""


@pytest.mark.lesson("L13")
@pytest.mark.skipif(sys.platform != "linux", reason="reads glibc's counters")
def test_products_of_all_row_counts_keep_few_bytes() -> None:
    """oneDNN keeps code for each row count: 40 to 100 MB of a weight before rows were padded."""
    command = [sys.executable, "-P", "-c", KEPT_BYTES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    found = json.loads(done.stdout)
    assert all(size < 16 << 20 for size in found.values()), found
