"""What `octavo bench kernels` runs on a GPU, and the same calls at tiny sizes on the CPU.

`pytest -m gpu tests/kernels/test_gpu.py` on a machine with a GPU; elsewhere they are skipped.
"""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from octavo.benchmarks.kernels import gpu
from octavo.benchmarks.kernels.cases import Case, cases
from octavo.benchmarks.kernels.gpu import Peaks, as_table, check, gpu_row, measure_peaks
from octavo.benchmarks.kernels.linears import int4_layers
from octavo.benchmarks.kernels.resources import SHAPES, Shape
from octavo.kernels.fp8_linear import FP8, fp8_linear, quantize_rows_fp8
from octavo.kernels.int4_layout import Int4Groups, pack_int4
from octavo.kernels.int4_linear import int4_linear, int4_linear_ref

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
TINY = Shape("tiny", 1, 64, 48, 6, 2)
KERNELS = {"paged_chunk", "paged_decode", "vision_attention", "add_rms_norm", "swiglu",
           "mrope_write_kv", "cut_patches"}  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def tiny_cases() -> list[Case]:
    torch.manual_seed(0)
    return list(cases(TINY, CPU, torch.float32, scale=64))


def test_every_case_is_right_on_the_cpu() -> None:
    """Kernel (in the interpreter), oracle and torch's equivalent give the same numbers."""
    found = tiny_cases()
    assert {case.kernel for case in found} == KERNELS
    for case in found:
        error, right = check(case)
        assert right, (case.kernel, case.work.case, error)
        if case.peer is not None:
            torch.testing.assert_close(case.peer(), case.oracle(), rtol=1e-4, atol=1e-4)


def test_rows_and_fractions() -> None:
    """With a clock that says 2 ms each time."""
    case = next(case for case in tiny_cases() if case.kernel == "paged_decode")
    row = gpu_row(case, Peaks(1e6, 1e9), lambda call: 2.0)
    assert row.right and (row.ms, row.peer_ms) == (2.0, 2.0)
    assert row.of_bandwidth == pytest.approx(case.work.bytes / 2e-3 / 1e6)
    assert row.of_peak == pytest.approx(case.work.operations / 2e-3 / 1e9)
    console = Console(width=200, record=True)
    console.print(as_table([row], "title"))
    assert "paged_decode" in console.export_text()


def test_peaks() -> None:
    found = measure_peaks(CPU, lambda call: (call(), 4.0)[1], size=16)
    assert found.bytes_per_s == pytest.approx(2 * 16 * 256 / 4e-3)
    assert found.operations_per_s == pytest.approx(2 * 16**3 / 4e-3)


def test_a_wrong_kernel_is_reported() -> None:
    case = next(case for case in tiny_cases() if case.kernel == "swiglu")
    wrong = Case(**{**vars(case), "run": lambda: case.oracle() + 1})
    error, right = check(wrong)
    assert not right and error == pytest.approx(1.0)


def check_linears(shape: Shape, n: int, device: torch.device) -> None:
    """Products with weights of four bits and in e4m3, against the same sums in float64."""
    torch.manual_seed(n)
    for layer in int4_layers(shape):
        sizes, groups = (layer.in_size, layer.out_size), layer.in_size // 128
        x = torch.randn(n, layer.in_size, dtype=torch.float16, device=device)
        bias = torch.randn(layer.out_size, dtype=torch.float16, device=device)
        numbers = torch.randint(0, 16, sizes, dtype=torch.uint8, device=device)
        zeros = torch.randint(1, 16, (groups, sizes[1]), dtype=torch.uint8, device=device)
        scales = torch.rand(groups, sizes[1], device=device) * 1e-3 + 1e-4
        int4 = pack_int4(Int4Groups(numbers, zeros, scales.half()))
        found, expected = (f(x, int4, bias) for f in (int4_linear, int4_linear_ref))
        torch.testing.assert_close(found, expected, rtol=3e-3, atol=3e-3)
        if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            continue  # has no e4m3 products
        weight, scale = torch.randn(sizes[::-1], device=device).to(FP8), scales[0] + 1e-3
        found = fp8_linear(x, weight, scale, bias)
        rows, row_scale = quantize_rows_fp8(x)
        expected = (rows.double() * row_scale[:, None]) @ (weight.double() * scale[:, None]).T
        torch.testing.assert_close(found, (expected + bias).half(), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("n", [2, 70])
def test_linears_on_the_cpu(n: int) -> None:
    check_linears(Shape("tiny", 1, 1152, 128, 1, 1), n, CPU)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("n", [1, 16, 40, 64, 512, 2048])
def test_linears_at_real_shapes_on_a_gpu(n: int) -> None:
    """With every row of the table: a few rows split over inputs, and chunks."""
    check_linears(SHAPES["7B"], n, CUDA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(["2B"], None)
    assert "no GPU here" in capsys.readouterr().out


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_at_real_shapes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for case in cases(SHAPES[name], CUDA, dtype):
        error, right = check(case)
        assert right, (case.kernel, case.work.case, error)
        torch.cuda.empty_cache()


@pytest.mark.gpu
@needs_gpu
def test_bench_kernels(tmp_path: Path) -> None:
    """Prints times beside torch's, and the fractions of bandwidth and peak (`-s` shows them)."""
    file = tmp_path / "kernels.json"
    assert gpu.run(["2B", "7B"], file)
    report = json.loads(file.read_text())
    assert {row["kernel"] for row in report["rows"]} == KERNELS
    assert all(row["ms"] > 0 for row in report["rows"])
