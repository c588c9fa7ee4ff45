"""Weights of four bits: layouts against packers written out here, the kernel against its oracle
in Triton's interpreter, in a process of its own. `test_kernels_compiled.py` has its code."""

import pytest
import torch
import triton

from octavo.kernels import split_linear
from octavo.kernels.int4_layout import (
    Int4Groups,
    PackedInt4,
    in_order,
    pack_int4,
    unpack_awq,
    unpack_gptq,
    unpack_int4,
)
from octavo.kernels.int4_linear import int4_linear, int4_linear_ref

INTERPRETED = triton.knobs.runtime.interpret


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def along_columns(rows: list[list[int]], order: tuple[int, ...]) -> torch.Tensor:
    """[rows, out] -> int32 [rows, out / 8]; four bits i of a word are column order[i] of eight."""
    words = [
        [signed(sum(row[at + order[i]] << 4 * i for i in range(8))) for at in range(0, len(row), 8)]
        for row in rows
    ]
    return torch.tensor(words, dtype=torch.int32)


def random_groups(in_size: int, out_size: int, group: int, most_zero: int = 15) -> Int4Groups:
    shape = (in_size // group, out_size)
    return Int4Groups(
        torch.randint(0, 16, (in_size, out_size), dtype=torch.uint8),
        torch.randint(1, most_zero + 1, shape, dtype=torch.uint8),
        (torch.rand(shape) * 0.02 + 0.001).half(),
    )


def same(found: Int4Groups, expected: Int4Groups) -> None:
    assert torch.equal(found.numbers, expected.numbers)
    assert torch.equal(found.zeros, expected.zeros)
    assert torch.equal(found.scales, expected.scales.half())


def test_awq_layout() -> None:
    groups = random_groups(256, 24, 128)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    words, zeros = (along_columns(x.tolist(), order) for x in (groups.numbers, groups.zeros))
    assert words.shape == (256, 3) and zeros.shape == (2, 3)
    same(unpack_awq(words, zeros, groups.scales), groups)


def test_gptq_layout() -> None:
    groups = random_groups(256, 24, 128, most_zero=16)
    plain = tuple(range(8))
    words = along_columns(groups.numbers.T.tolist(), plain).T.contiguous()
    zeros = along_columns((groups.zeros - 1).tolist(), plain)
    assert words.shape == (32, 24) and zeros.shape == (2, 3)
    same(unpack_gptq(words, zeros, groups.scales), groups)


def test_g_idx() -> None:
    plain = torch.arange(512) // 128
    assert in_order(plain, 128) and in_order(plain[256:], 128)
    assert not in_order(plain[torch.randperm(512, generator=torch.Generator())], 128)


@pytest.mark.parametrize(("in_size", "group"), [(256, 128), (384, 128), (192, 64), (512, 64)])
def test_our_layout_and_back(in_size: int, group: int) -> None:
    groups = random_groups(in_size, 24, group)
    packed = pack_int4(groups)
    assert packed.group_size == group and packed.words.shape == (-(-in_size // 256), 24, 32)
    same(unpack_int4(packed), groups)
    word = int(packed.words[0, 5, 9])  # inputs 64 j + 18 and 64 j + 19
    for j in range(min(4, in_size // 64)):
        assert word >> 4 * j & 15 == int(groups.numbers[64 * j + 18, 5])
        assert word >> 4 * j + 16 & 15 == int(groups.numbers[64 * j + 19, 5])


def test_large_groups_are_cut() -> None:
    groups = random_groups(512, 8, 512)
    packed = pack_int4(groups)
    assert packed.group_size == 128
    assert torch.equal(unpack_int4(packed).dequantize(), groups.dequantize())


def test_no_scale_is_zero_in_our_layout() -> None:
    """Neither one that was stored, nor those of the inputs that fill up the last block."""
    groups = random_groups(384, 8, 128)
    groups.scales[1, 3] = 0
    packed = pack_int4(groups)
    assert packed.scales.shape == (4, 8) and (packed.scales != 0).all()
    assert torch.equal(unpack_int4(packed).dequantize(), groups.dequantize())


def make(n: int, in_size: int, out_size: int, group: int) -> tuple[torch.Tensor, PackedInt4]:
    torch.manual_seed(n)
    return torch.randn(n, in_size).half(), pack_int4(random_groups(in_size, out_size, group))


# q, k, v of the 2B scaled down; its MLP on two ranks (a last block half full); few, some, many rows
SHAPES = [
    (1, 1536, 256, 128),
    (3, 896, 136, 128),
    (16, 512, 64, 64),
    (20, 384, 200, 128),
    (40, 512, 72, 64),
    (70, 640, 136, 128),
]


def test_int4_linear_whose_scales_differ_widely() -> None:
    """The sum changes its unit at every group: by far, in both directions, and past a zero."""
    torch.manual_seed(0)
    groups = random_groups(1024, 64, 64)
    groups.scales.mul_(10.0 ** torch.randint(-4, 2, groups.scales.shape))
    groups.scales[::5, 1::7] = 0
    groups.scales[1::3, ::2] *= -1
    x, weight = torch.randn(4, 1024).half(), pack_int4(groups)
    found, expected = (f(x, weight) for f in (int4_linear, int4_linear_ref))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_linear(shape: tuple[int, int, int, int], has_bias: bool) -> None:
    x, weight = make(*shape)
    bias = torch.randn(shape[2]).half() if has_bias else None
    found, expected = (f(x, weight, bias) for f in (int4_linear, int4_linear_ref))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", ["many", "wide"])
def test_int4_linear_in_large_tiles(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_linear, "linear_size", lambda *args: size)
    x, weight = make(70, 640, 264, 128)
    found, expected = (f(x, weight) for f in (int4_linear, int4_linear_ref))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
