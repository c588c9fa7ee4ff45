"""A request's input is freed when the request ends, not at the next garbage collection."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.input.preprocess_pool import InputJob, TokenizeJob
from octavo.engine.input.processor import ProcessedInput

SHORT = octavo.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[octavo.AsyncLLM]:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with octavo.AsyncLLM(folder, dtype="float32", max_model_len=1024) as engine:
        yield engine


def image_uri(seed: int, size: int = 64) -> str:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (seed * 40 % 256, 20, 30)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def messages(image: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": parts}]


def alive() -> int:
    kinds = (InputJob, TokenizeJob, ProcessedInput)
    return sum(isinstance(each, kinds) for each in gc.get_objects())


def test_input_is_freed_without_the_garbage_collector(engine: octavo.AsyncLLM) -> None:
    """After answers, rejected images, invalid grammars and requests whose readers have left."""
    bad_image = "data:image/png;base64," + base64.b64encode(b"\x89PNG" + bytes(64)).decode()
    bad_form = octavo.StructuredOutput(regex="a{3,1}")

    async def ask(prompt: Any, params: octavo.SamplingParams, stop_early: bool = False) -> None:
        with contextlib.suppress(ValueError):
            stream = engine.chat(prompt, params)
            async with contextlib.aclosing(stream):
                async for _ in stream:
                    if stop_early:
                        return

    async def ask_all() -> None:
        for seed in range(3):
            await ask(messages(image_uri(seed)), SHORT)
            await ask(messages(bad_image), SHORT)
            await ask(messages(image_uri(seed)), octavo.SamplingParams(structured=bad_form))
            long = octavo.SamplingParams(max_tokens=200, ignore_eos=True)
            await ask(messages(image_uri(9 + seed)), long, stop_early=True)
            await engine.tokenize("a few words")
        while engine.engine.has_requests:
            await asyncio.sleep(0.01)

    asyncio.run(ask_all())  # what is made at first use stays
    gc.collect()
    gc.disable()
    try:
        before = alive()
        asyncio.run(ask_all())
        assert alive() <= before + 2  # threads of the pool may still hold their last
    finally:
        gc.enable()
