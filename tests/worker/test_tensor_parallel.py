"""One, two and four ranks through the engine: the same tokens; and how often the ranks talk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_requests import TinyDriver, image, text, tiny_request
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.batch import EncodeTask
from octavo.engine.runner.encode_stage import EncodeStage
from octavo.engine.runner.model_runner import ModelRunner

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 384}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def conversations() -> list[list[dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def picture(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    one, two = picture(84, 112), picture(140, 56)
    frames = [picture(112, 56) for _ in range(8)]
    parts: list[list[dict[str, Any]]] = [
        [{"type": "text", "text": "Who are you, and what do you do all day?"}],
        [{"type": "image", "image": one}, {"type": "text", "text": "What is it?"}],
        [
            {"type": "image", "image": two},
            {"type": "text", "text": "and"},
            {"type": "image", "image": one},
            {"type": "text", "text": "Which is larger?"},
        ],
        [
            {"type": "video", "video": frames, "min_pixels": 784, "max_pixels": 12544},
            {"type": "text", "text": "What happens?"},
        ],
    ]
    return [[{"role": "user", "content": part}] for part in parts]


def answers(checkpoint: Path, **settings: Any) -> tuple[list[list[int]], int]:
    """Tokens of each conversation, and how many requests were preempted on the way."""
    with octavo.LLM(checkpoint, **{**SETTINGS, **settings}) as llm:
        state, preempted = llm.engine.scheduler.state, []
        preempt = state.preempt
        state.preempt = lambda r: preempted.append(r) or preempt(r)  # type: ignore
        outs = llm.chat(conversations(), GREEDY)
        llm.engine.scheduler.check_integrity()
    assert [out.error for out in outs] == [""] * len(outs)
    return [out.outputs[0].token_ids for out in outs], len(preempted)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Of one rank, each conversation alone and whole."""
    with octavo.LLM(checkpoint, **SETTINGS) as llm:
        outs = [llm.chat(messages, GREEDY)[0] for messages in conversations()]
    assert all(len(set(out.outputs[0].token_ids)) > 3 for out in outs)
    return [out.outputs[0].token_ids for out in outs]


@pytest.mark.lesson("L14")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_tp_only_ranks_give_the_same_tokens_chunked_and_preempted(
    checkpoint: Path, expected: list[list[int]], size: int
) -> None:
    kept = 8192 if size == 1 else 4096  # bytes of a block: of both KV heads, or of one
    found, num_preempted = answers(
        checkpoint,
        tensor_parallel_size=size,
        max_num_batched_tokens=23,
        kv_cache_memory_bytes=24 * kept,
    )
    assert found == expected
    assert num_preempted > 0


def test_ranks_meet_twice_a_layer_and_no_more(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside that: once for the embedding of tokens, once for the logits, once for what was drawn,
    and once for each rank that encodes."""
    calls: Counter[str] = Counter()

    def gather(x: torch.Tensor, parts: list[torch.Tensor], **more: Any) -> None:
        calls.update(["gather"])
        for part in parts:
            part.copy_(x)  # else it is whatever lies in memory

    monkeypatch.setattr(torch.distributed, "gather", gather)
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(
            torch.distributed, name, lambda *args, name=name, **kwargs: calls.update([name])
        )
    config, preprocess = ModelConfig.from_dir(checkpoint), PreprocessConfig.from_dir(checkpoint)
    device = torch.device("cpu")
    runner = ModelRunner(
        checkpoint, config, preprocess, device, torch.float32, 16, TensorParallel(0, 2)
    )
    runner.load()
    runner.allocate(32)
    request = tiny_request(config, [text(1, 20), *image(1, 56, 84)])
    driver = TinyDriver(runner, 32)
    driver.step([request], [len(request.token_ids)])
    layers = config.num_hidden_layers
    assert calls == {"all_reduce": 2 * layers + 1, "gather": 1, "broadcast": 2}
    calls.clear()
    driver.step([request], [1])
    assert calls == {"all_reduce": 2 * layers + 1, "gather": 1, "broadcast": 1}


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_encode_before_they_wait_for_each_other(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Else they would encode one after the other."""
    done: list[str] = []
    config, preprocess = ModelConfig.from_dir(checkpoint), PreprocessConfig.from_dir(checkpoint)

    def visual(patches: torch.Tensor, grids: list[Any]) -> torch.Tensor:
        done.append("encode")
        return torch.zeros(len(patches) // 4, config.hidden_size)

    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda x, src, **_: done.append(f"broadcast {src}")
    )
    parallel, cpu = TensorParallel(rank, 2), torch.device("cpu")
    stage = EncodeStage(visual, config, preprocess, parallel, cpu, torch.float32)  # type: ignore
    tasks = tuple(
        EncodeTask((bytes([i]), 0), (1, 4, 4), i, np.zeros((1, 56, 56, 3), np.uint8))
        for i in (0, 1)
    )
    found = stage.run(tasks)
    assert list(found) == [task.key for task in tasks]
    assert done == ["encode", "broadcast 0", "broadcast 1"]
