"""Keys and values in e4m3: the kernels in Triton's interpreter, and their reference.

`test_kernels_compiled.py` checks the compiled code, `test_fp8_serving.py` a model with this cache.
"""

import pytest
import torch
import triton
import triton.language as tl

from octavo.kernels import paged_chunk
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.fp8_linear import FP8
from octavo.kernels.kv_cache import Fp8Cache, copy_blocks, gather_kv, write_kv
from octavo.kernels.mrope import e4m3_bits, mrope_cos_sin, mrope_write_kv, mrope_write_kv_ref
from octavo.kernels.paged_attention import paged_attention, paged_attention_ref
from octavo.kernels.paged_tile import e4m3_bits_moved

INTERPRETED = triton.knobs.runtime.interpret
CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS = [(64, 8), (28, 4), (12, 2), (3, 1)]  # 72B, 7B, 2B; 2B on four ranks
MIXES = {  # (tokens computed before, tokens of this step) of each row
    "chunks": [(0, 37), (16, 16), (61, 7)],
    "decode": [(0, 1), (15, 1), (16, 1), (77, 1)],
    "mixed": [(40, 1), (9, 13), (0, 2), (300, 1)],
}
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    return request.param


def empty(shape: tuple[int, ...], device: torch.device) -> Fp8Cache:
    numbers = torch.zeros(shape, dtype=torch.uint8, device=device)
    return Fp8Cache(numbers, torch.zeros(shape[:3], device=device))


def filled(shape: tuple[int, ...], device: torch.device) -> Fp8Cache:
    """Return a cache with random e4m3 numbers and scales of very different sizes."""
    numbers = (torch.randn(shape, device=device) * 100).clamp(-448, 448).to(FP8)
    scales = torch.exp2(torch.randint(-12, -6, shape[:3], device=device)) * 1.3
    return Fp8Cache(numbers.view(torch.uint8), scales)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def make_batch(
    device: torch.device, rows: list[tuple[int, int]], block_size: int
) -> tuple[AttentionBatch, int]:
    """Return a batch over scattered blocks other than block 0, which pads the tables."""
    lens = [start + count for start, count in rows]
    blocks = [-(-length // block_size) for length in lens]
    order = (1 + torch.randperm(sum(blocks) + 2)).tolist()
    tables = [[order.pop() if i < count else 0 for i in range(max(blocks))] for count in blocks]
    counts = [count for _, count in rows]
    return AttentionBatch.from_lists(counts, lens, tables, block_size, device), sum(blocks) + 3


@triton.jit
def _moved_kernel(words_ptr, out_ptr):
    words = tl.load(words_ptr + tl.arange(0, 128))[None, :]
    out = tl.load(out_ptr + tl.arange(0, 256))[None, :]
    tl.store(out_ptr + tl.arange(0, 256)[None, :], e4m3_bits_moved(words, out))


@pytest.mark.parametrize(("dtype", "lift"), [(torch.float16, 8), (torch.bfloat16, 120)])
def test_moved_bits_equal_the_numbers(device: torch.device, dtype: torch.dtype, lift: int) -> None:
    """All bytes except the two NaNs, which are never written."""
    if not INTERPRETED and device.type == "cpu":
        pytest.skip("kernels/test_interpreter.py runs it")
    numbers = ALL_BYTES.to(device)
    found = torch.zeros(256, dtype=dtype, device=device)
    _moved_kernel[(1,)](numbers.view(torch.int16), found)
    kept = (ALL_BYTES & 0x7F) != 0x7F
    expected = numbers.view(FP8).double()
    assert torch.equal((found.double() * 2.0**lift)[kept], expected[kept])


@triton.jit
def _bits_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, e4m3_bits(tl.load(x_ptr + offs)))


def test_bits_round_to_the_nearest_number(device: torch.device) -> None:
    """Check around each number and each midpoint, and ties to even, against torch."""
    if not INTERPRETED and device.type == "cpu":
        pytest.skip("kernels/test_interpreter.py runs it")
    numbers = ALL_BYTES.view(FP8).float()
    numbers = numbers[numbers.isfinite()].sort().values
    edges = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    around = [edges, edges.nextafter(torch.tensor(1e9)), edges.nextafter(torch.tensor(-1e9))]
    x = torch.cat([*around, torch.randn(512) * 100]).clamp(-448, 448)
    x = torch.nn.functional.pad(x, (0, 2048 - len(x))).to(device)
    found = torch.zeros(2048, dtype=torch.uint8, device=device)
    _bits_kernel[(1,)](x, found, SIZE=2048)
    assert torch.equal(found.view(FP8).float(), x.to(FP8).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(h, 128) for h in HEADS] + [((6, 2), 24)])
def test_write(
    device: torch.device, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """One row has an outlier, one is zero, one has NaNs; slot -1 writes nothing."""
    n, block_size, half = 11, 16, head_dim // 2
    num_heads, kv_heads = heads
    total = num_heads + 2 * kv_heads
    qkv = torch.randn(n, total, head_dim, device=device).to(dtype)
    qkv[1, :, 3] = 3000.0
    qkv[2] = 0.0
    qkv[4] = torch.nan
    q, k, v = qkv.split([num_heads, kv_heads, kv_heads], dim=1)
    section = (half - 2 * (half // 3), half // 3, half // 3)
    positions = torch.randint(0, 3000, (3, n), dtype=torch.int32, device=device)
    cos, sin = mrope_cos_sin(positions, 1e6 ** -(torch.arange(half) / half), section)
    slots = torch.randperm(5 * block_size, device=device)[:n]
    slots[3] = slots[7] = -1
    shape = (5, kv_heads, block_size, head_dim)
    found, expected = ([empty(shape, device) for _ in "kv"] for _ in "ab")
    out = mrope_write_kv(q, k, v, cos, sin, *found, slots)
    turned = mrope_write_kv_ref(q, k, v, cos, sin, *expected, slots)
    torch.testing.assert_close(out, turned, rtol=4e-3, atol=4e-3, equal_nan=True)
    written = int((found[1].scales != 0).sum())
    assert written == (n - 2) * kv_heads
    table = torch.arange(5, device=device)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.scales == 0, theirs.scales == 0)
        a, b = (gather_kv(cache, table, 5 * block_size) for cache in (ours, theirs))
        # rotated keys may differ in the last bit, which e4m3 may round to the next number
        torch.testing.assert_close(a, b, rtol=0.13, atol=1e-3, equal_nan=True)
        close_ones = (a - b).abs() <= 4e-3 * b.abs()
        assert (close_ones | a.isnan()).float().mean() > 0.98
    rows = gather_kv(found[1], table, 5 * block_size)[
        :, slots
    ]  # [kv_heads, n, d]; -1: the last slot
    kept = [i for i in range(n) if i not in (3, 4, 7)]
    got, exact = rows[:, kept], v.transpose(0, 1)[:, kept].float()
    bound = torch.maximum(exact.abs() / 16, exact.abs().amax(-1, keepdim=True) / 448 * 2**-10)
    assert ((got - exact).abs() <= bound * 1.01).all()
    assert rows[:, 4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [(h, 128, 16) for h in HEADS] + [((6, 2), 40, 8), ((4, 2), 16, 64)],
)
def test_attention(
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
    args = (q, filled(shape, device), filled(shape, device), batch, head_dim**-0.5)
    close(paged_attention(*args), paged_attention_ref(*args))


@pytest.mark.parametrize("splits", [1, 3, 4])
def test_splits(device: torch.device, monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Split chunks (some splits have no visible key) and decoding rows of over 256 keys."""
    monkeypatch.setattr(paged_chunk, "chunk_splits", lambda *args: splits)
    batch, num_blocks = make_batch(device, [(251, 9), (1023, 1), (255, 1), (0, 1), (600, 33)], 16)
    q = 5 * torch.randn(45, 4, 32, device=device)
    shape = (num_blocks, 2, 16, 32)
    args = (q, filled(shape, device), filled(shape, device), batch, 0.25)
    close(paged_attention(*args), paged_attention_ref(*args))


def test_rows_do_not_read_foreign_slots(device: torch.device) -> None:
    """Put NaNs into block 0, which pads tables, and after the end of a row's last block."""
    batch, num_blocks = make_batch(device, [(20, 1), (9, 13)], 16)
    q = torch.randn(14, 4, 32, device=device)
    caches = [filled((num_blocks, 2, 16, 32), device) for _ in "kv"]
    before = paged_attention(q, *caches, batch, 0.2)
    seen = torch.zeros(num_blocks, 16, dtype=torch.bool, device=device)
    for row, length in enumerate(batch.host_context_lens):
        for at in range(length):
            seen[int(batch.block_tables[row, at // 16]), at % 16] = True
    for cache in caches:
        cache.scales.masked_fill_(~seen[:, None], torch.nan)
    assert torch.equal(paged_attention(q, *caches, batch, 0.2), before)


def test_reference_against_float32(device: torch.device) -> None:
    """Compare numbers and scales with float32 keys and values that were never in e4m3."""
    outlier = 1 + 30 * (torch.arange(32, device=device) == 5)
    k, v = (torch.randn(40, 2, 32, device=device) * outlier for _ in "kv")
    caches = [empty((3, 2, 16, 32), device) for _ in "kv"]
    write_kv(k, v, *caches, torch.arange(40, device=device))
    found = gather_kv(caches[0], torch.arange(3, device=device), 40)
    assert ((found - k.transpose(0, 1)).abs() <= k.transpose(0, 1).abs() / 16 + 2e-4).all()
    batch = AttentionBatch.from_lists([40], [40], [[0, 1, 2]], 16, device)
    q = torch.randn(40, 4, 32, device=device)
    made = paged_attention_ref(q, *caches, batch, 0.02)
    keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    whole = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), keys, values, is_causal=True, scale=0.02
    ).transpose(0, 1)
    assert (made - whole).abs().max() < 0.05 * whole.abs().max()


def test_copied_blocks_include_their_scales(device: torch.device) -> None:
    cache = filled((6, 2, 16, 32), device)
    before = gather_kv(cache, torch.tensor([[5], [0]], device=device), 16)
    copy_blocks(cache, torch.tensor([[5, 0], [0, 3]], device=device))
    after = gather_kv(cache, torch.tensor([[0], [3]], device=device), 16)
    assert torch.equal(after, before)
