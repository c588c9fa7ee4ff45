"""Keys and values in e4m3: kernels in Triton's interpreter and their oracles, what they compile to,
a whole model over such a cache, and its settings.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import octavo
from octavo.benchmarks.eval_demo_model import KINDS, questions
from octavo.benchmarks.kernel_resources import MODELS, shape_of
from octavo.benchmarks.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.tiny_engine import TinyEngine
from octavo.benchmarks.tiny_requests import TinyRequest, image, text, tiny_request
from octavo.engine.capacity import plan_capacity
from octavo.engine.config import (
    EMBEDDED_MODEL,
    ConfigError,
    EngineConfig,
    ModelConfig,
    PreprocessConfig,
)
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.decode_graph import DecodeGraphs, StaticDecode
from octavo.engine.runner.kv_cache import kv_block_bytes
from octavo.engine.runner.loader import resolve_kv_cache_dtype
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.worker import process
from octavo.engine.worker.loading import GroupMemory
from octavo.kernels import paged_chunk
from octavo.kernels.attention_batch import AttentionBatch
from octavo.kernels.fp8_linear import FP8
from octavo.kernels.kv_cache import Fp8Cache, copy_blocks, gather_kv, write_kv
from octavo.kernels.mrope import e4m3_bits, mrope_cos_sin, mrope_write_kv, mrope_write_kv_ref
from octavo.kernels.paged_attention import paged_attention, paged_attention_ref
from octavo.kernels.paged_tile import e4m3_bits_moved
from octavo.scheduler.admission import SchedulerConfig

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
    """Any numbers of e4m3, and scales that differ by a lot."""
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
    """Over scattered blocks, none of them block 0, which pads the tables."""
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
def test_moved_bits_are_the_numbers(device: torch.device, dtype: torch.dtype, lift: int) -> None:
    """All but the two that are not numbers, which are never written."""
    if not INTERPRETED and device.type == "cpu":
        pytest.skip("test_in_the_interpreter runs it")
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


def test_bits_are_the_nearest_number(device: torch.device) -> None:
    """Beside each number and beside each middle of two, and ties to even: as torch rounds."""
    if not INTERPRETED and device.type == "cpu":
        pytest.skip("test_in_the_interpreter runs it")
    numbers = ALL_BYTES.view(FP8).float()
    numbers = numbers[numbers.isfinite()].sort().values
    edges = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    beside = [edges, edges.nextafter(torch.tensor(1e9)), edges.nextafter(torch.tensor(-1e9))]
    x = torch.cat([*beside, torch.randn(512) * 100]).clamp(-448, 448)
    x = torch.nn.functional.pad(x, (0, 2048 - len(x))).to(device)
    found = torch.zeros(2048, dtype=torch.uint8, device=device)
    _bits_kernel[(1,)](x, found, SIZE=2048)
    assert torch.equal(found.view(FP8).float(), x.to(FP8).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(h, 128) for h in HEADS] + [((6, 2), 24)])
def test_write(
    device: torch.device, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """One row has an outlier, one is zero, one is not a number; slot -1 writes nothing."""
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
        # a key may be turned by another last bit, which e4m3 rounds to the next number
        torch.testing.assert_close(a, b, rtol=0.13, atol=1e-3, equal_nan=True)
        close_ones = (a - b).abs() <= 4e-3 * b.abs()
        assert (close_ones | a.isnan()).float().mean() > 0.98
    rows = gather_kv(found[1], table, 5 * block_size)[:, slots]  # [kv_heads, n, d]; -1 is another's
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
    """Of chunks, some without a key that a token sees; and of rows that decode, over 256 keys."""
    monkeypatch.setattr(paged_chunk, "chunk_splits", lambda *args: splits)
    batch, num_blocks = make_batch(device, [(251, 9), (1023, 1), (255, 1), (0, 1), (600, 33)], 16)
    q = 5 * torch.randn(45, 4, 32, device=device)
    shape = (num_blocks, 2, 16, 32)
    args = (q, filled(shape, device), filled(shape, device), batch, 0.25)
    close(paged_attention(*args), paged_attention_ref(*args))


def test_a_row_does_not_see_what_is_not_its(device: torch.device) -> None:
    """A NaN in block 0, which pads tables, and past the end of a row's last block."""
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


def test_the_oracle_by_hand(device: torch.device) -> None:
    """Numbers and scales against float32 keys and values that were never in e4m3."""
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


def test_a_forked_block_takes_its_scales_along(device: torch.device) -> None:
    cache = filled((6, 2, 16, 32), device)
    before = gather_kv(cache, torch.tensor([[5], [0]], device=device), 16)
    copy_blocks(cache, torch.tensor([[5, 0], [0, 3]], device=device))
    after = gather_kv(cache, torch.tensor([[0], [3]], device=device), 16)
    assert torch.equal(after, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def make_runner(folder: Path, num_blocks: int) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    args = (folder, config, preprocess, CPU, torch.float32, 16, TensorParallel())
    runner = ModelRunner(*args, kv_cache_dtype=FP8)
    runner.load()
    runner.allocate(num_blocks)
    return runner


def outputs(runner: ModelRunner, limits: dict[str, int], names: list[str]) -> dict[str, list[int]]:
    """Two prompts, one with a picture and two forks that draw, through the scheduler."""
    engine = TinyEngine(runner, SchedulerConfig(**limits))
    for i, name in enumerate(names):
        parts: list[Any] = [text(i, 20), *image(i, 56, 56), text(5, 3)] if i else [text(9, 40)]
        request: TinyRequest = tiny_request(runner.config, parts)
        request.params = replace(request.params, temperature=1.0, seed=4)
        engine.add(name, request, 9, num_forks=2 if i else 0)
    engine.run()
    return {name: engine.output(name) for name in engine.requests}


@pytest.mark.skipif(INTERPRETED, reason="slow there")
def test_chunks_preemption_and_forks_change_no_token(folder: Path) -> None:
    """Scales are each token's own: how a prompt is cut, and what lies beside it, does not matter."""
    whole = make_runner(folder, 64)
    plain = {"num_blocks": 64, "max_model_len": 256}
    expected = outputs(whole, plain, ["a", "b"])
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    cut = {**plain, "max_num_batched_tokens": 7}
    assert outputs(make_runner(folder, 64), cut, ["a", "b"]) == expected
    tight = {"num_blocks": 8, "max_model_len": 128}
    assert outputs(make_runner(folder, 8), tight, ["a", "b"]) == expected
    assert outputs(make_runner(folder, 64), plain, ["a"])["a"] == expected["a"]


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
def test_static_decode_steps_are_the_plain_ones(folder: Path) -> None:
    """What CUDA graphs repeat, over a cache in e4m3."""
    limits = {"num_blocks": 64, "max_model_len": 256}
    plain, static = make_runner(folder, 64), make_runner(folder, 64)
    decode = StaticDecode(static.model.decoder, static.caches, 256, CPU)
    static.graphs = DecodeGraphs(decode, lambda compute: compute)
    assert outputs(static, limits, ["a", "b"]) == outputs(plain, limits, ["a", "b"])
    assert static.graphs.replays


def test_a_block_is_what_is_allocated(folder: Path) -> None:
    runner = make_runner(folder, 4)
    held = sum(k.nbytes + v.nbytes for k, v in runner.caches)
    assert runner.measure().kv_block_bytes * 4 == held


@pytest.mark.parametrize("model", MODELS)
def test_the_same_memory_holds_nearly_twice_the_tokens(model: str) -> None:
    shape = shape_of(model, 1)
    config = replace(
        ModelConfig.from_dir(EMBEDDED_MODEL), num_hidden_layers=28, head_dim=128,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    bytes_of = {kind: kv_block_bytes(config, 1, 16, kind) for kind in (torch.bfloat16, FP8)}
    assert bytes_of[FP8] == 2 * 28 * 16 * shape.kv_heads * (128 + 4)
    asked = EngineConfig(kv_cache_memory_bytes=1 << 30, max_model_len=8192)
    tokens = []
    for size in bytes_of.values():
        memory = GroupMemory(1, 1 << 36, 1 << 36, size, "bfloat16", "cuda")
        tokens.append(16 * plan_capacity(asked, config, memory)[0])
    assert tokens[1] / tokens[0] == pytest.approx(256 / 132, rel=0.01)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp9': must be auto or fp8"):
        EngineConfig(kv_cache_dtype="fp9")
    for device in (CPU, torch.device("cuda")):
        for name in ("auto", ""):
            assert resolve_kv_cache_dtype(name, device, torch.float16) == torch.float16
    assert resolve_kv_cache_dtype("fp8", torch.device("cuda"), torch.float16) == FP8
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp8': is for GPUs; leave it out on cpu"):
        resolve_kv_cache_dtype("fp8", CPU, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="an engine's workers would be interpreted too")
def test_a_cpu_refuses_it() -> None:
    """The setting reaches the worker, whose text reaches the caller."""
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp8': is for GPUs"):
        octavo.LLM(device="cpu", kv_cache_dtype="fp8")


@pytest.fixture
def oracle_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(process, "WORKER_MODULE", "octavo.benchmarks.fp8_cache_worker")
    yield


@pytest.mark.skipif(INTERPRETED, reason="an engine's workers would be interpreted too")
@pytest.mark.usefixtures("oracle_worker")
def test_the_embedded_model_answers_as_without() -> None:
    """By the oracles, on the CPU, through an engine and its worker."""
    asked = [question for kind in KINDS for question in islice(questions(kind, 7), 10)]
    greedy = octavo.SamplingParams(temperature=0, max_tokens=32)
    found = []
    for kind in ("auto", "fp8"):
        with octavo.LLM(device="cpu", dtype="float32", kv_cache_dtype=kind) as llm:
            answers = llm.chat([question.messages for question in asked], greedy)
            found.append([answer.outputs[0].token_ids for answer in answers])
    same = sum(a == b for a, b in zip(*found, strict=True))
    assert same >= 0.95 * len(asked)


@pytest.mark.skipif(INTERPRETED, reason="is what runs this file in the interpreter")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).name]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
