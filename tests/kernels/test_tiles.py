"""Attention by AMX tiles, on processors without: `tile_trap.c` plays the instructions one by one as
the manual has them, from the very bytes that the compiler made. Where AMX is, the same runs on it.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.kernels import native
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.paged_attention import paged_attention, paged_attention_ref
from octavo.kernels.vision_attention import vision_attention, vision_attention_ref

CPU = torch.device("cpu")
TRAP = Path(__file__).with_name("tile_trap.c")
FLAGS = ("-shared", "-fPIC", "-O2", "-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-fopenmp")
NO_AMX = not torch.cpu._is_amx_tile_supported()
needs_native = pytest.mark.skipif(native.library() is None, reason="no kernels for this processor")
needs_trap = pytest.mark.skipif(not NO_AMX, reason="this processor has AMX itself")


def compiled(to: Path, *arguments: str | Path) -> ctypes.CDLL:
    if shutil.which("gcc") is None or native.library() is None:
        pytest.skip("no compiler, or none of the instructions")
    subprocess.run(["gcc", *FLAGS, "-o", to, *arguments], check=True, timeout=120)
    return ctypes.CDLL(str(to))


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("trap") / "trap.so", TRAP)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, that take it that AMX is there; what is their own can be called."""
    sources = sorted(Path(native.__file__).parent.glob("*.c"))
    played = ["-DOCTAVO_TRAPPED_AMX"] if NO_AMX else []
    made = compiled(tmp_path_factory.mktemp("kernels") / "kernels.so", *played, *sources)
    native._declare(made)
    made.amx_product.argtypes = [*[ctypes.c_long] * 3, *[ctypes.c_void_p, ctypes.c_long] * 3,
                                 ctypes.c_void_p]  # fmt: skip
    return made


@pytest.fixture
def amx(
    trap: ctypes.CDLL, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ctypes.CDLL]:
    """A machine with AMX; gives what plays it."""
    monkeypatch.setattr(native, "library", lambda: kernels)
    monkeypatch.setattr(native, "has_amx", lambda: True)
    native.has_tiles.cache_clear()
    if NO_AMX:
        trap.trap_install()
    yield trap
    if NO_AMX:
        fault(trap, 0)
        trap.trap_remove()
    native.has_tiles.cache_clear()


def fault(trap: ctypes.CDLL, kind: int) -> None:
    ctypes.c_int.in_dll(trap, "trap_fault").value = kind


def count_of(trap: ctypes.CDLL) -> int:
    return ctypes.c_long.in_dll(trap, "trap_count").value


def product(
    kernels: ctypes.CDLL,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    fade: torch.Tensor | None,
) -> None:
    """c [m, n] = a [m, k] b [k, n], or fade c + a b; rows of padding follow a's and c's."""
    (m, k), n = a.shape, b.shape[1]
    pairs = b.unflatten(0, (k // 2, 2)).transpose(1, 2).contiguous()
    padded = [torch.full((m + 16, x.shape[1] + 16), torch.nan, dtype=x.dtype) for x in (a, c)]
    for to, x in zip(padded, (a, c), strict=True):
        to[:m, : x.shape[1]] = x
    before = ctypes.create_string_buffer(128)
    aligned = ctypes.c_void_p(-(-ctypes.addressof(before) // 64) * 64)
    assert native.has_tiles()
    kernels.amx_begin(aligned)
    kernels.amx_product(
        *(m, n, k, padded[0].data_ptr(), k + 16, pairs.data_ptr(), n, padded[1].data_ptr(), n + 16),
        None if fade is None else fade.data_ptr(),
    )
    kernels.amx_end(aligned)
    assert padded[1][:, n:].isnan().all(), "columns that are not C's"
    c.copy_(padded[1][:m, :n])


@needs_native
@pytest.mark.parametrize("m", [1, 6, 16, 17, 33, 91, 96])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (64, 32), (64, 96), (64, 128), (80, 64), (128, 64)])
def test_products_of_tiles(amx: ctypes.CDLL, kernels: ctypes.CDLL, m: int, n: int, k: int) -> None:
    torch.manual_seed(m * n * k)
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.randn(m, n)
    fade = torch.rand(m).masked_fill(torch.rand(m) < 0.3, 1)
    expected = a.double() @ b.double()
    added = expected + fade[:, None].double() * c.double()
    found = torch.full((m, n), torch.nan)  # what was there is of no matter
    product(kernels, a, b, found, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    product(kernels, a, b, c, fade)
    torch.testing.assert_close(c.double(), added, rtol=1e-5, atol=1e-5)


def batch_of(rows: list[tuple[int, int]], block_size: int) -> tuple[AttentionBatch, int]:
    """Rows of (tokens before, tokens of this step) over blocks in any order."""
    lens = [before + count for before, count in rows]
    blocks = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(blocks)).tolist()
    tables = np.zeros((len(rows), max(blocks)), np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = [order.pop() for _ in range(count)]
    counts = [count for _, count in rows]
    return AttentionBatch.from_lists(counts, lens, tables, block_size, CPU), sum(blocks)


@needs_native
@pytest.mark.parametrize(
    "rows", [[(0, 37)], [(16, 16), (3, 20), (61, 7)], [(40, 1), (9, 13), (150, 2)]]
)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [((12, 2), 128, 16), ((28, 4), 128, 32), ((3, 1), 128, 16), ((2, 2), 80, 16), ((6, 2), 16, 7)],
)
def test_chunks(
    amx: ctypes.CDLL,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    rows: list[tuple[int, int]],
) -> None:
    torch.manual_seed(0)
    batch, blocks = batch_of(rows, block_size)
    q = torch.randn(sum(count for _, count in rows), heads[0], head_dim).bfloat16()
    caches = [torch.randn(blocks, heads[1], block_size, head_dim).bfloat16() for _ in range(2)]
    before = count_of(amx)
    found = paged_attention(q, *caches, batch, head_dim**-0.5)
    assert count_of(amx) - before > 100 or not NO_AMX
    expected = paged_attention_ref(q, *caches, batch, head_dim**-0.5)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@needs_native
def test_one_token_at_a_time_has_no_tiles(amx: ctypes.CDLL) -> None:
    assert native.has_tiles()
    torch.manual_seed(0)
    batch, blocks = batch_of([(40, 1), (700, 1)], 16)
    q = torch.randn(2, 12, 128).bfloat16()
    caches = [torch.randn(blocks, 2, 16, 128).bfloat16() for _ in range(2)]
    before = count_of(amx)
    found = paged_attention(q, *caches, batch, 0.1)
    assert count_of(amx) == before
    torch.testing.assert_close(
        found, paged_attention_ref(q, *caches, batch, 0.1), rtol=0.02, atol=0.02
    )


@needs_native
def test_a_token_s_bits_do_not_depend_on_its_chunk(amx: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    kv = [torch.randn(12, 2, 16, 128).bfloat16() for _ in range(2)]
    q = torch.randn(66, 12, 128).bfloat16()

    def run(begin: int, end: int) -> torch.Tensor:
        batch = AttentionBatch.from_lists([end - begin], [end], [list(range(12))], 16, CPU)
        return paged_attention(q[begin:end], *kv, batch, 0.1)

    pieces = [run(a, b) for a, b in ((0, 7), (7, 9), (9, 50), (50, 66))]
    assert torch.equal(torch.cat(pieces), run(0, 66))
    assert torch.equal(run(0, 65), run(0, 66)[:65])  # its last tile is of one token


@needs_native
@pytest.mark.parametrize("seqlens", [(4,), (16, 16), (130,), (12, 100, 61, 4)])
@pytest.mark.parametrize("head_dim", [16, 32, 80, 128])
def test_frames(amx: ctypes.CDLL, head_dim: int, seqlens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(seqlens), 3, 2, head_dim).bfloat16().unbind(1)
    bounds = torch.tensor((0, *seqlens)).cumsum(0).int()
    before = count_of(amx)
    found = vision_attention(q, k, v, bounds, seqlens, head_dim**-0.5)
    assert count_of(amx) - before > 50 or not NO_AMX
    expected = vision_attention_ref(q, k, v, seqlens, head_dim**-0.5)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@needs_native
def test_what_one_size_left_in_memory_does_not_reach_the_next(amx: ctypes.CDLL) -> None:
    """NaN in everything that threads keep, then heads that do not fill their tiles."""
    torch.manual_seed(0)
    for head_dim in (80, 16):
        wrong = torch.full((300, 3, 8, 128), torch.nan).bfloat16()
        bounds = torch.tensor([0, 300], dtype=torch.int32)
        assert vision_attention(*wrong.unbind(1), bounds, (300,), 0.1).isnan().all()
        qkv = torch.randn(70, 3, 4, head_dim).bfloat16()
        found = vision_attention(*qkv.unbind(1), torch.tensor([0, 70]).int(), (70,), 0.1)
        expected = vision_attention_ref(*qkv.unbind(1), (70,), 0.1)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def config(**changes: int) -> bytearray:
    """Palette 1 with 16 rows of 64 bytes in each of eight tiles, but for byte `at` = value."""
    made = bytearray(64)
    made[0] = 1
    made[16:32:2] = bytes([64] * 8)
    made[48:56] = bytes([16] * 8)
    for at, value in changes.items():
        made[int(at.removeprefix("at_"))] = value
    return made


@needs_native
@needs_trap
def test_tiles_are_left_as_they_were(amx: ctypes.CDLL, kernels: ctypes.CDLL) -> None:
    """oneDNN's, or none."""
    for theirs in (config(at_16=32, at_48=7), bytearray(64)):
        amx.trap_configure((ctypes.c_char * 64).from_buffer(theirs))
        for dim in (80, 128):
            qkv = torch.randn(20, 3, 3, dim).bfloat16()
            vision_attention(*qkv.unbind(1), torch.tensor([0, 20]).int(), (20,), 0.1)
        found = ctypes.create_string_buffer(64)
        amx.trap_read_config(found)
        assert found.raw == bytes(theirs)


REFUSED = {
    "no configuration": (None, "trap_dot()", "not configured"),
    "palette": (config(at_0=2), "", "palette"),
    "reserved": (config(at_5=1), "", "reserved"),
    "17 rows": (config(at_48=17), "", "too large"),
    "65 bytes": (config(at_16=65), "", "too large"),
    "rows alone": (config(at_16=0), "", "alone"),
    "ninth tile": (config(at_32=64, at_56=16), "", "more tiles"),
    "a tile that is none": (config(at_22=0, at_51=0), "trap_load(3, data, 64)", "not configured"),
    "rows": (config(at_48=8), "trap_dot()", "rows of C and of A"),
    "columns": (config(at_20=32), "trap_dot()", "columns of C and of B"),
    "depth": (config(at_18=32), "trap_dot()", "columns of A and rows of B"),
    "half a pair": (config(at_18=34), "trap_dot()", "half a pair"),
    "twice": (config(), "trap_dot_twice()", "twice"),
}


@needs_native
@needs_trap
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_processor_would_reject_kills(trap: ctypes.CDLL, case: str) -> None:
    wrong, then, why = REFUSED[case]
    lines = ["import ctypes", f"trap = ctypes.CDLL({trap._name!r})", "trap.trap_install()"]
    lines += ["data = ctypes.create_string_buffer(4096)"]
    if wrong is not None:
        lines += [f"trap.trap_configure({bytes(wrong)!r})"]
    lines += [f"trap.{then}" if then else "pass"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGILL
    assert why in done.stderr


@needs_native
@needs_trap
def test_loads_fill_up_with_zeros_and_denormals_are_none(amx: ctypes.CDLL) -> None:
    """The player itself, by hand: 3 x 2 pairs times 2 pairs x 1 column."""
    shapes = config(at_16=4, at_48=3, at_18=8, at_49=3, at_20=4, at_50=2)
    amx.trap_configure((ctypes.c_char * 64).from_buffer(shapes))
    a = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1e-39, 1, 0, 0]]).bfloat16()
    b = torch.tensor([[1, 10], [100, 1000]]).bfloat16()
    c = torch.tensor([[0.5], [0.25], [1e-39]])
    for tile, x in enumerate((c, a, b)):
        amx.trap_load(tile, ctypes.c_void_p(x.data_ptr()), ctypes.c_long(x.stride(0) * x.itemsize))
    amx.trap_dot()
    out = torch.full((16, 4), -1.0)
    amx.trap_store(ctypes.c_void_p(out.data_ptr()), ctypes.c_long(16))
    assert out[:3, 0].tolist() == [4321.5, 8765.25, 10]
    assert (out[3:] == -1).all() and (out[:, 1:] == -1).all()


@needs_native
def test_amx_that_computes_is_used(amx: ctypes.CDLL, caplog: pytest.LogCaptureFixture) -> None:
    assert native.has_tiles() and native.attends_frames()
    assert not caplog.records


@needs_native
@needs_trap
@pytest.mark.parametrize("kind", [1, 2, 3, 4], ids=["wrong bit", "dies", "hangs", "config kept"])
def test_amx_that_does_not_is_left_to_torch(
    amx: ctypes.CDLL, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    fault(amx, kind)
    assert not native.has_tiles() and not native.attends_frames()
    assert len(caplog.records) == 1 and "AMX" in caplog.text
    fault(amx, 0)
    assert not native.has_tiles()  # once and for all
    qkv = torch.randn(20, 3, 2, 80).bfloat16()
    before = count_of(amx)
    monkeypatch.setattr(native, "call", functools.partial(pytest.fail, "not torch's"))
    found = vision_attention(*qkv.unbind(1), torch.tensor([0, 20]).int(), (20,), 0.1)
    assert count_of(amx) == before
    expected = vision_attention_ref(*qkv.unbind(1), (20,), 0.1)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@needs_native
def test_the_check_asks_the_processor() -> None:
    """The library that is installed: no AMX, no tiles, whatever torch is made to say."""
    kernels = native.library()
    assert kernels is not None
    assert kernels.octavo_check_amx() == (0 if NO_AMX else 1)


@needs_native
def test_it_compiles_where_no_one_knows_amx(tmp_path: Path) -> None:
    source = Path(native.__file__).with_name("amx.c")
    made = compiled(tmp_path / "without.so", "-U__linux__", source)
    assert made.octavo_check_amx() == 0
