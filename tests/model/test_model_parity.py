"""The model against transformers' on tiny random checkpoints in float32: tokens and logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_requests import (
    TinyDriver,
    TinyMedia,
    TinyRequest,
    image,
    text,
    tiny_request,
    video,
)
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.batch import SamplingBatch
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.sampler import Sampler

NEW_TOKENS = 8
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The videos have more temporal patches than rows or columns, or several encode units.
CONVERSATIONS = {
    "text": [text(1, 23)],
    "one_image": [text(2, 5), *image(1, 84, 140), text(3, 7)],
    "three_images": [
        text(4, 3), *image(2, 56, 56), text(5, 2), *image(3, 28, 112), *image(4, 84, 28), text(6, 4)
    ],
    "video": [text(7, 4), *video(5, 12, 56, 84), text(8, 6)],
    "image_and_video": [
        text(9, 4), *image(6, 56, 84), text(1, 3), *video(7, 8, 56, 28), text(2, 5)
    ],
}  # fmt: skip


@dataclass(eq=False)
class RecordingSampler:
    """A sampler that keeps the logits that it is shown."""

    inner: Sampler
    logits: list[torch.Tensor] = field(default_factory=list)

    def sample(
        self, logits: torch.Tensor, batch: SamplingBatch, last_token_ids: torch.Tensor
    ) -> torch.Tensor:
        self.logits.append(logits.clone())
        return self.inner.sample(logits, batch, last_token_ids)


def make_runner(folder: Path, device: torch.device = CPU) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    runner = ModelRunner(folder, config, preprocess, device, torch.float32, 16, TensorParallel())
    runner.load()
    runner.allocate(128)
    return runner


def patches_of(media: TinyMedia, preprocess: PreprocessConfig) -> torch.Tensor:
    """Patches as transformers takes them, spelled out with loops."""
    frames = media.pixels
    if not media.is_video:
        frames = np.repeat(frames, 2, axis=0)
    scaled = (frames / 255 - preprocess.image_mean) / preprocess.image_std
    patches = []
    for t in range(0, len(scaled), 2):
        for row in range(0, scaled.shape[1], 28):
            for column in range(0, scaled.shape[2], 28):
                for y in (row, row + 14):
                    for x in (column, column + 14):
                        cut = scaled[t : t + 2, y : y + 14, x : x + 14]
                        patches.append(cut.transpose(3, 0, 1, 2).ravel())
    return torch.tensor(np.stack(patches), dtype=torch.float32)


@dataclass(eq=False)
class Reference:
    """transformers' model on the same folder, fed our positions, without a cache."""

    folder: Path

    def __post_init__(self) -> None:
        self.preprocess = PreprocessConfig.from_dir(self.folder)
        self.banned = list(ModelConfig.from_dir(self.folder).vision_token_ids)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        )

    @torch.inference_mode()
    def generate(self, request: TinyRequest) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the logits [NEW_TOKENS, vocab] that they were taken from."""
        ids, logits = list(request.token_ids), []
        for _ in range(NEW_TOKENS):
            positions = torch.from_numpy(request.positions_of(0, len(ids))).long()[:, None]
            out = self.model(torch.tensor([ids]), position_ids=positions, **self.media(request))
            logits.append(out.logits[0, -1])
            allowed = logits[-1].clone()
            allowed[self.banned] = -torch.inf
            ids.append(int(allowed.argmax()))
        return ids[request.num_prompt_tokens :], torch.stack(logits)

    def media(self, request: TinyRequest) -> dict[str, torch.Tensor]:
        given = {}
        names = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
        for is_video, (pixels, grid) in enumerate(names):
            items = [key for key, item in request.media.items() if item.is_video == is_video]
            if items:
                patches = [patches_of(request.media[key], self.preprocess) for key in items]
                given[pixels] = torch.cat(patches)
                given[grid] = torch.tensor([request.grids[key] for key in items])
        return given


@dataclass(frozen=True)
class Expected:
    """What transformers says: tokens, and the logits [NEW_TOKENS, vocab] behind them."""

    tokens: list[int]
    logits: torch.Tensor


def assert_same_logits(found: torch.Tensor, expected: Expected) -> None:
    torch.testing.assert_close(found, expected.logits, atol=1e-4, rtol=0)


def check_against_reference(folder: Path, names: list[str]) -> dict[str, Expected]:
    runner, reference = make_runner(folder), Reference(folder)
    expected = {}
    for name in names:
        runner.sampler = RecordingSampler(runner.sampler)
        request = tiny_request(runner.config, CONVERSATIONS[name])
        expected[name] = Expected(*reference.generate(request))
        found = TinyDriver(runner, 128).generate([request], NEW_TOKENS)
        assert found == [expected[name].tokens], name
        assert_same_logits(torch.cat(runner.sampler.logits), expected[name])
    return expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tied=False, vocab_size=283)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Expected]:
    return check_against_reference(folder, list(CONVERSATIONS))


def test_tokens_and_logits_are_those_of_transformers(expected: dict[str, Expected]) -> None:
    assert set(expected) == set(CONVERSATIONS)
    # a model that repeats itself would agree with many a wrong one
    assert all(len(set(each.tokens)) > 3 for each in expected.values())


@pytest.mark.parametrize(
    "shape",
    [
        {"tied": True, "nested_names": True, "nested_config": True, "shards": 3},
        {"heads": 6, "kv_heads": 1, "head_dim": 8, "vision_head_dim": 20, "vision_heads": 3},
        {"heads": 2, "kv_heads": 2, "head_dim": 40, "layers": 3, "vision_layers": 1},
    ],
    ids=["newer_form_tied", "one_kv_head", "head_dim_40"],
)
def test_other_shapes_and_forms(shape: dict[str, object], tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, seed=3, **shape)  # type: ignore[arg-type]
    check_against_reference(tmp_path, ["text", "image_and_video"])


def test_l33_mrope_resume_differs_from_transformers_after_a_long_video(folder: Path) -> None:
    """What follows a video starts past all its positions, not past its rows and columns alone."""
    config = ModelConfig.from_dir(folder)
    request = tiny_request(config, CONVERSATIONS["video"])
    span = [i for i, token in enumerate(request.token_ids) if token == config.video_token_id]
    before, after = request.positions[:, span], request.positions[:, span[-1] + 1 :]
    assert after.min() == before.max() + 1


RANK_PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from octavo.benchmarks.fakes.tiny_requests import TinyDriver, TinyMedia, tiny_request
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.model.parallel import connect
from octavo.engine.runner.model_runner import ModelRunner

folder, meeting, rank, size, tokens = sys.argv[1:6]
config = ModelConfig.from_dir(Path(folder))
device = torch.device("cpu")
parallel = connect(int(rank), int(size), device, meeting)
preprocess = PreprocessConfig.from_dir(Path(folder))
runner = ModelRunner(Path(folder), config, preprocess, device, torch.float32, 16, parallel)
runner.load()
runner.allocate(256)

def part(value):
    if isinstance(value, list):
        return value
    pixels = np.frombuffer(bytes.fromhex(value["pixels"]), np.uint8).reshape(value["shape"])
    return TinyMedia(pixels, value["is_video"])

def requests():
    return [tiny_request(config, [part(p) for p in parts]) for parts in conversations]

conversations = json.load(sys.stdin)
batched = TinyDriver(runner, 256).generate(requests(), int(tokens), chunk=16)
logits, plain = [], runner.sampler
class Recording:
    def sample(self, given, batch, last):
        logits[-1].append(given[0].tolist())
        return plain.sample(given, batch, last)
runner.sampler = Recording()
for request, expected in zip(requests(), batched):
    logits.append([])
    runner.embeddings.clear()
    alone = TinyDriver(runner, 256).generate([request], int(tokens))
    assert alone == [expected]
print(json.dumps({"tokens": batched, "logits": logits}))
parallel.close()
"""


def as_json(part: list[int] | TinyMedia) -> object:
    if isinstance(part, list):
        return part
    pixels = part.pixels
    return {"pixels": pixels.tobytes().hex(), "shape": pixels.shape, "is_video": part.is_video}


def check_ranks(
    folder: Path, size: int, meeting: Path, expected: dict[str, Expected], names: list[str]
) -> None:
    """`size` rank processes: the same tokens batched in chunks and alone, rank 0's logits too."""
    told = json.dumps([[as_json(part) for part in CONVERSATIONS[name]] for name in names])
    answers = run_ranks(folder, size, meeting, told)
    for answer in answers:
        assert answer["tokens"] == [expected[name].tokens for name in names]
    for name, logits in zip(names, answers[0]["logits"], strict=True):
        assert_same_logits(torch.tensor(logits), expected[name])


def run_ranks(folder: Path, size: int, meeting: Path, told: str) -> list[dict[str, Any]]:
    arguments = [sys.executable, "-P", "-c", RANK_PROGRAM, str(folder), str(meeting)]
    ranks = [
        subprocess.Popen(
            [*arguments, str(rank), str(size), str(NEW_TOKENS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]
    try:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(told)
            rank.stdin.close()
        outputs = [rank.stdout.read() for rank in ranks if rank.stdout is not None]
        assert [rank.wait(timeout=60) for rank in ranks] == [0] * size
        return [json.loads(output) for output in outputs]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_l14_tp_only_two_ranks_give_the_same_tokens_and_logits(
    folder: Path, expected: dict[str, Expected], tmp_path: Path
) -> None:
    check_ranks(folder, 2, tmp_path / "meeting", expected, list(CONVERSATIONS))


def test_l14_tp_only_four_ranks_replicate_two_kv_heads(
    folder: Path, expected: dict[str, Expected], tmp_path: Path
) -> None:
    check_ranks(folder, 4, tmp_path / "meeting", expected, ["text", "three_images"])


def test_l14_tp_only_the_heads_of_the_2b_on_four_ranks(tmp_path: Path) -> None:
    """12 heads, 2 KV heads: three query heads a rank, half a group, and a copy of its KV head."""
    folder = write_tiny_checkpoint(tmp_path / "twelve", heads=12, kv_heads=2, head_dim=8)
    expected = check_against_reference(folder, ["image_and_video"])
    check_ranks(folder, 4, tmp_path / "meeting", expected, ["image_and_video"])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_tokens(folder: Path, expected: dict[str, Expected]) -> None:
    runner = make_runner(folder, torch.device("cuda"))
    requests = [tiny_request(runner.config, parts) for parts in CONVERSATIONS.values()]
    found = TinyDriver(runner, 128).generate(requests, NEW_TOKENS)
    assert found == [each.tokens for each in expected.values()]
