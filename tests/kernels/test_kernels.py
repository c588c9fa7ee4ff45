"""Every kernel against its oracle, and every oracle against loops written out here.

The same tests run three ways: on the CPU path; in Triton's interpreter (`test_interpreter.py`
runs this file with TRITON_INTERPRET=1); and on a GPU with `pytest -m gpu`.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton

from octavo.kernels import native, paged_chunk
from octavo.kernels.activation import swiglu, swiglu_ref
from octavo.kernels.kv_cache import copy_blocks, gather_kv, write_kv
from octavo.kernels.linear import linear, linear_ref
from octavo.kernels.mrope import mrope_cos_sin, mrope_write_kv, mrope_write_kv_ref
from octavo.kernels.norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from octavo.kernels.paged_attention import AttentionBatch, paged_attention, paged_attention_ref
from octavo.kernels.patches import cut_patches, cut_patches_ref
from octavo.kernels.vision_attention import vision_attention, vision_attention_ref

INTERPRETED = triton.knobs.runtime.interpret
HEADS = [(64, 8), (28, 4), (12, 2), (3, 1), (4, 4)]  # 72B, 7B, 2B; 2B on four ranks; no groups
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=["cpu", "plain", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """ "plain" is a CPU without the compiled kernels."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    if request.param != "plain":
        return torch.device(request.param)
    if INTERPRETED:
        pytest.skip("the interpreter has no such path")
    monkeypatch.setattr(native, "library", lambda: None)
    return torch.device("cpu")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 1536, 3584])
def test_rms_norm(device: torch.device, size: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(7, size, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(size, device=device).to(dtype)
    close(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))
    wide = x.double()
    plain = wide / torch.sqrt((wide**2).sum(-1, keepdim=True) / size + 1e-6) * weight.double()
    close(rms_norm_ref(x, weight, 1e-6), plain.to(dtype))
    found, expected = (f(x, residual, weight, 1e-6) for f in (add_rms_norm, add_rms_norm_ref))
    close(found[0], expected[0])
    assert torch.equal(found[1], x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 1024, 1100])
def test_swiglu(device: torch.device, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 2 * size, device=device).to(dtype)
    close(swiglu(x), swiglu_ref(x))
    gate, up = x[:, :size].double(), x[:, size:].double()
    close(swiglu_ref(x), (gate / (1 + torch.exp(-gate)) * up).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(device: torch.device, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*s, device=device).to(dtype) for s in ((9, 70), (33, 70), (33,)))
    scale = 70**-0.5
    close(linear(x * scale, weight, bias), linear_ref(x * scale, weight, bias))
    close(linear(x * scale, weight), linear_ref(x * scale, weight))


def test_mrope_section_picks_the_axis(device: torch.device) -> None:
    positions = torch.tensor([[5, 1], [7, 2], [11, 3]], dtype=torch.int32, device=device)
    inv_freq = 1.0 / 10_000 ** (torch.arange(8) / 8)
    cos, sin = mrope_cos_sin(positions, inv_freq, (2, 3, 3))
    for token in range(2):
        for i in range(8):
            axis = 0 if i < 2 else 1 if i < 5 else 2
            angle = float(positions[axis, token]) * float(inv_freq[i])
            assert math.isclose(float(cos[token, i]), math.cos(angle), abs_tol=1e-5)
            assert math.isclose(float(sin[token, i]), math.sin(angle), abs_tol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(h, 128) for h in HEADS] + [((6, 2), 24)])
def test_mrope_write_kv(
    device: torch.device, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """Queries, keys and values are strided views of one product; slot -1 writes nothing."""
    n, block_size = 11, 16
    num_heads, kv_heads = heads
    total = num_heads + 2 * kv_heads
    qkv = torch.randn(n, total * head_dim, device=device).to(dtype).unflatten(1, (total, head_dim))
    q, k, v = qkv.split([num_heads, kv_heads, kv_heads], dim=1)
    positions = torch.randint(0, 3000, (3, n), dtype=torch.int32, device=device)
    half = head_dim // 2
    section = (half - 2 * (half // 3), half // 3, half // 3)
    cos, sin = mrope_cos_sin(positions, 1e6 ** -(torch.arange(half) / half), section)
    slots = torch.randperm(5 * block_size, device=device)[:n]
    slots[3] = slots[7] = -1
    shape = (5, kv_heads, block_size, head_dim)
    found, expected = (
        [torch.full(shape, 9.0, device=device).to(dtype) for _ in "kv"] for _ in "ab"
    )
    out = mrope_write_kv(q, k, v, cos, sin, *found, slots)
    close(out, mrope_write_kv_ref(q, k, v, cos, sin, *expected, slots))
    close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert int((found[1] != 9.0).any(-1).sum()) == (n - 2) * kv_heads
    first, second = q[0, 0, 1].double(), q[0, 0, 1 + half].double()
    turned = first * cos[0, 1].double() - second * sin[0, 1].double()
    assert abs(float(out[0, 0, 1]) - float(turned)) < 10 * TOLERANCE[dtype]


def test_gather_is_the_inverse_of_write(device: torch.device) -> None:
    k_cache, v_cache = (torch.zeros(6, 2, 4, 8, device=device) for _ in range(2))
    k, v = (torch.randn(10, 2, 8, device=device) for _ in range(2))
    table = torch.tensor([4, 0, 5], device=device)
    slots = torch.tensor([table[i // 4] * 4 + i % 4 for i in range(10)], device=device)
    write_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(gather_kv(k_cache, table, 10), k.transpose(0, 1))
    assert torch.equal(gather_kv(v_cache, table, 7), v[:7].transpose(0, 1))


def make_batch(
    device: torch.device, rows: list[tuple[int, int]], block_size: int
) -> tuple[AttentionBatch, int]:
    """Rows of (tokens computed before, tokens of this step) over scattered blocks."""
    lens = [start + count for start, count in rows]
    blocks = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(blocks) + 3).tolist()
    tables = np.zeros((len(rows), max(blocks)), np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = [order.pop() for _ in range(count)]
    counts = [count for _, count in rows]
    return AttentionBatch.from_lists(counts, lens, tables, block_size, device), sum(blocks) + 3


MIXES = {
    "prompts": [(0, 1), (0, 5), (0, 37)],
    "chunks": [(16, 16), (3, 20), (61, 7)],
    "decode": [(0, 1), (15, 1), (16, 1), (77, 1)],
    "mixed": [(40, 1), (9, 13), (0, 2), (300, 1)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [(h, 128, 16) for h in HEADS] + [((6, 2), 40, 8), ((4, 2), 16, 64)],
)
def test_paged_attention(
    device: torch.device,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    mix: str,
    dtype: torch.dtype,
) -> None:
    batch, num_blocks = make_batch(device, MIXES[mix], block_size)
    n = sum(batch.num_scheduled_tokens)
    q = torch.randn(n, heads[0], head_dim, device=device).to(dtype)
    shape = (num_blocks, heads[1], block_size, head_dim)
    k_cache, v_cache = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    args = (q, k_cache, v_cache, batch, head_dim**-0.5)
    close(paged_attention(*args), paged_attention_ref(*args))


def test_decode_over_many_splits_with_large_scores(device: torch.device) -> None:
    """Splits whose sums differ by far join without overflow; a split's length is 256 keys."""
    batch, num_blocks = make_batch(device, [(1023, 1), (255, 1), (256, 1), (0, 1)], 16)
    q = 30 * torch.randn(4, 4, 32, device=device)
    k_cache, v_cache = (torch.randn(num_blocks, 2, 16, 32, device=device) for _ in range(2))
    args = (q, k_cache, v_cache, batch, 1.0)
    close(paged_attention(*args), paged_attention_ref(*args))


def test_decode_over_more_keys_than_splits_of_256_hold(device: torch.device) -> None:
    """A row has at most 64 splits: from 16,385 keys on they are of 512, for that row alone."""
    batch, num_blocks = make_batch(device, [(16_384, 1), (16_383, 1), (700, 1)], 128)
    q = torch.randn(3, 2, 16, device=device)
    k_cache, v_cache = (torch.randn(num_blocks, 1, 128, 16, device=device) for _ in range(2))
    args = (q, k_cache, v_cache, batch, 0.25)
    close(paged_attention(*args), paged_attention_ref(*args))


def test_chunks_whose_keys_are_split(device: torch.device) -> None:
    """Late in a long prompt, few tokens: several splits, beside rows whose keys are taken whole."""
    rows = [(2048, 5), (4092, 9), (40, 7), (3000, 1)]
    batch, num_blocks = make_batch(device, rows, 64)
    q = 3 * torch.randn(sum(count for _, count in rows), 4, 16, device=device)
    k_cache, v_cache = (torch.randn(num_blocks, 2, 64, 16, device=device) for _ in range(2))
    args = (q, k_cache, v_cache, batch, 0.25)
    close(paged_attention(*args), paged_attention_ref(*args))


def test_a_split_of_which_some_tokens_see_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three splits of 128 keys: the last begins at 256, the chunk at 251. A fourth has no key."""
    q = torch.randn(9, 4, 16, device=device)
    k_cache, v_cache = (torch.randn(20, 2, 16, 16, device=device) for _ in range(2))
    batch, _ = make_batch(device, [(251, 9)], 16)
    for splits in (3, 4):
        monkeypatch.setattr(paged_chunk, "chunk_splits", lambda *args, n=splits: n)
        args = (q, k_cache, v_cache, batch, 0.25)
        close(paged_attention(*args), paged_attention_ref(*args))


def test_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    """Bit for bit: splits have a fixed size, tiles hold one row."""
    q = torch.randn(1, 4, 32, device=device)
    k_cache, v_cache = (torch.randn(60, 2, 16, 32, device=device) for _ in range(2))
    tables = np.arange(60, dtype=np.int32).reshape(2, 30)
    alone = AttentionBatch.from_lists([1], [333], tables[:1, :21], 16, device)
    beside = AttentionBatch.from_lists([1, 1], [333, 470], tables, 16, device)
    one = paged_attention(q, k_cache, v_cache, alone, 0.2)
    two = paged_attention(q.repeat(2, 1, 1), k_cache, v_cache, beside, 0.2)
    assert torch.equal(one[0], two[0])


def test_attention_batch_from_lists() -> None:
    tables = np.array([[7, 2, 0], [5, 0, 0], [9, 8, 1]])
    batch = AttentionBatch.from_lists([3, 1, 2], [6, 4, 12], tables, 4, torch.device("cpu"))
    assert batch.slot_mapping.tolist() == [31, 8, 9, 23, 6, 7]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert (batch.decode_rows.tolist(), batch.chunk_rows) == ([1], (0, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlens", [(4,), (16, 16, 16), (130,), (12, 12, 260, 4)])
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 80), (2, 16), (3, 32), (2, 128), (2, 24)])
def test_vision_attention(
    device: torch.device, heads: int, head_dim: int, seqlens: tuple[int, ...], dtype: torch.dtype
) -> None:
    n = sum(seqlens)
    qkv = torch.randn(n, 3, heads, head_dim, device=device).to(dtype)
    q, k, v = qkv.unbind(1)
    bounds = torch.tensor((0, *seqlens)).cumsum(0).to(device, torch.int32)
    scale = head_dim**-0.5
    found = vision_attention(q, k, v, bounds, seqlens, scale)
    close(found, vision_attention_ref(q, k, v, seqlens, scale))


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_cut_patches(device: torch.device, frames: int, dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (frames, 56, 84, 3), dtype=torch.uint8, device=device)
    args: tuple[Any, ...] = (pixels, MEAN, STD, 14, 2, 2, dtype)
    close(cut_patches(*args), cut_patches_ref(*args))
    found = cut_patches(*args).float().cpu().numpy()
    index = 0
    for t in range(-(-frames // 2)):
        for row in range(0, 56, 28):
            for column in range(0, 84, 28):
                for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                    both = [min(2 * t + i, frames - 1) for i in range(2)]
                    cut = pixels.cpu().numpy()[both][
                        :, row + y : row + y + 14, column + x : column + x + 14
                    ]
                    expected = ((cut / 255 - MEAN) / STD).transpose(3, 0, 1, 2).ravel()
                    np.testing.assert_allclose(
                        found[index], expected, atol=4 * TOLERANCE[dtype], rtol=0
                    )
                    index += 1
    assert index == len(found)


def test_blocks_are_all_read_before_any_is_written() -> None:
    cache = torch.arange(6.0).reshape(6, 1, 1, 1).repeat(1, 2, 4, 3)
    copy_blocks(cache, torch.tensor([[5, 0, 0], [0, 3, 4]]))  # 5 to 0, and what was in 0 to 3 and 4
    assert cache[:, 0, 0, 0].tolist() == [5, 1, 2, 0, 0, 5]
