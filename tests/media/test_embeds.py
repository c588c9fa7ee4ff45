"""Embeddings in place of pixels: the same tokens as from the image itself, however it is served."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_engine import TinyEngine
from octavo.benchmarks.fakes.tiny_requests import TinyRequest, text, tiny_request
from octavo.benchmarks.fakes.tiny_requests import image as tiny_image
from octavo.benchmarks.fakes.tiny_requests import video as tiny_video
from octavo.benchmarks.robustness import at_steps
from octavo.engine.config.engine_config import ModelConfig, PreprocessConfig
from octavo.engine.errors import InputError
from octavo.engine.input.processor import InputProcessor
from octavo.engine.media.item import UnitContent, embeds_hash, media_hash
from octavo.engine.model.parallel import TensorParallel
from octavo.engine.runner.batch import EncodeTask
from octavo.engine.runner.model_runner import ModelRunner
from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.request import UnitKey

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NUM_BLOCKS, BLOCK_SIZE, NEW_TOKENS = 96, 8, 7


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> ModelRunner:
    config, preprocess = ModelConfig.from_dir(checkpoint), PreprocessConfig.from_dir(checkpoint)
    device, alone = torch.device("cpu"), TensorParallel()
    made = ModelRunner(checkpoint, config, preprocess, device, torch.float32, BLOCK_SIZE, alone)
    made.load()
    made.allocate(NUM_BLOCKS)
    return made


# Step by step, in this process: the scheduler, the batch and the runner.


def tiny(runner: ModelRunner) -> TinyRequest:
    """An image and a video of three units among text."""
    parts = [text(9, 4), *tiny_image(6, 56, 84), text(1, 3), *tiny_video(7, 12, 56, 28), text(2, 5)]
    return tiny_request(runner.config, parts, max_unit_temporal_patches=2)


def make_engine(runner: ModelRunner, **settings: int) -> TinyEngine:
    limits = {
        "num_blocks": NUM_BLOCKS,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_encode_tokens": 64,
        "encoder_cache_tokens": 64,
        **settings,
    }
    config = SchedulerConfig(block_size=BLOCK_SIZE, max_model_len=NUM_BLOCKS * BLOCK_SIZE, **limits)
    return TinyEngine(runner, config)


Embedded = tuple[list[int], dict[UnitKey, UnitContent]]


@pytest.fixture(scope="module")
def embedded(runner: ModelRunner) -> Embedded:
    """Tokens from the pixels, and the units with what the tower made of those."""
    engine = make_engine(runner)
    engine.add("a", tiny(runner), NEW_TOKENS)
    engine.run()
    units = {
        key: UnitContent(key[0], content.grid_thw, None, runner.embeddings[key].numpy().copy())
        for key, content in engine.pixels["a"].items()
    }
    assert len(units) == 4 and len(set(engine.output("a"))) > 3
    return engine.output("a"), units


@pytest.fixture
def no_tower(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a unit that came as an embedding was encoded")

    monkeypatch.setattr(runner.model.visual, "forward", refuse)


def add(engine: TinyEngine, name: str, units: dict[UnitKey, UnitContent]) -> None:
    engine.add(name, tiny(engine.runner), NEW_TOKENS)
    engine.pixels[name] = units


@pytest.mark.usefixtures("no_tower")
def test_chunks_of_every_size_give_the_tokens_of_the_pixels(
    runner: ModelRunner, embedded: Embedded
) -> None:
    expected, units = embedded
    for size in range(1, len(tiny(runner).token_ids) + 1):
        engine = make_engine(runner, max_num_batched_tokens=size, encoder_cache_tokens=20)
        add(engine, "a", units)
        engine.run()
        assert engine.output("a") == expected, f"in chunks of {size}"


@pytest.mark.usefixtures("no_tower")
@pytest.mark.parametrize("found_again", [True, False])
def test_preempted_at_each_step_gives_the_tokens_of_the_pixels(
    runner: ModelRunner, embedded: Embedded, found_again: bool
) -> None:
    """Also where neither blocks nor embeddings are left: they are sent once more."""
    expected, units = embedded
    for at in range(1, -(-len(tiny(runner).token_ids) // 13) + NEW_TOKENS - 1):
        engine = make_engine(runner, max_num_batched_tokens=13)
        add(engine, "a", units)
        for _ in range(at):
            engine.step()
        request, state = engine.requests["a"], engine.scheduler.state
        if not found_again:
            state.blocks.forget(request.block_table)
        state.preempt(request)
        if not found_again:
            for unit in request.units:
                state.encoder_cache.lose(unit.key)
            runner.embeddings.clear()
        engine.receive()  # of the step that it had no longer part in
        engine.run()
        assert engine.output("a") == expected, f"preempted after step {at}"


def test_in_one_step_beside_units_that_are_encoded(runner: ModelRunner, embedded: Embedded) -> None:
    """One with pixels between two that come as they are; each goes where it belongs."""
    expected, units = embedded
    engine = make_engine(runner)
    engine.add("a", tiny(runner), NEW_TOKENS)
    mixed = dict(engine.pixels["a"])
    for key in list(mixed)[::2]:
        mixed[key] = units[key]
    engine.pixels["a"] = mixed
    engine.run()
    assert engine.output("a") == expected
    for key, content in units.items():
        kept = runner.embeddings[key]
        torch.testing.assert_close(kept, torch.from_numpy(content.embeds))
        assert kept.untyped_storage().nbytes() == kept.nbytes  # L13: it keeps no other alive
    for key in list(mixed)[::2]:
        assert np.array_equal(runner.embeddings[key].numpy(), units[key].embeds)


def test_what_does_not_fit_its_grid_fails_its_request_alone(
    runner: ModelRunner, embedded: Embedded
) -> None:
    expected, units = embedded
    engine = make_engine(runner)
    other = tiny_request(runner.config, [text(3, 4), *tiny_image(8, 56, 84), text(2, 5)])
    engine.add("bad", other, NEW_TOKENS)
    (key,) = engine.pixels["bad"]
    cut = np.zeros((5, runner.config.hidden_size), np.float32)  # of 6 tokens
    engine.pixels["bad"] = {key: UnitContent(key[0], (1, 4, 6), None, cut)}
    add(engine, "good", units)
    engine.run()
    assert engine.output("good") == expected
    assert engine.output("bad") == [] and engine.requests["bad"].error


# Whole: from messages to tokens, in processes of their own.


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def image(seed: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed)}


def video(seed: int, frames: int) -> dict[str, Any]:
    stills = [picture(seed + i) for i in range(frames)]
    return {"type": "video", "video": stills, "min_pixels": 3136, "max_pixels": 6272}


CONVERSATIONS = [
    ask("What is it?", image(1)),
    ask("Which one of the three?", image(2), image(3), image(4)),
    ask("Where does it go?", video(5, 12)),  # of two units
    ask("And both?", image(6), video(7, 4)),
]


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> InputProcessor:
    config, preprocess = ModelConfig.from_dir(checkpoint), PreprocessConfig.from_dir(checkpoint)
    return InputProcessor(checkpoint, config, preprocess, 1024)


@pytest.fixture(scope="module")
def conversations(runner: ModelRunner, processor: InputProcessor) -> list[list[dict[str, Any]]]:
    """The same, with the tower's output in place of all items but the third image."""
    return [with_embeds(runner, processor, messages) for messages in CONVERSATIONS]


def with_embeds(runner: ModelRunner, processor: InputProcessor, messages: Any) -> Any:
    ready = processor.from_prompt(messages)
    units, parts = iter(ready.units), []
    media = iter(ready.media)
    for part in messages[0]["content"]:
        if part["type"] == "text":
            parts.append(part)
            continue
        item = next(media)
        made = [tower(runner, next(units)) for _ in range(-(-item.grid_thw[0] // 4))]
        embeds = octavo.MediaEmbeds(np.concatenate(made), item.grid_thw)
        keep = len(parts) == 2
        parts.append(part if keep else {"type": item.kind, item.kind: embeds})
    return [{"role": "user", "content": parts}]


@torch.inference_mode()
def tower(runner: ModelRunner, unit: UnitContent) -> np.ndarray:
    task = EncodeTask((unit.media_hash, 0), unit.grid_thw, 0, unit.pixels)
    return runner.model.visual(runner._encoder._patches(task), [unit.grid_thw]).numpy()


def make(checkpoint: Path, **settings: Any) -> octavo.LLM:
    return octavo.LLM(
        checkpoint,
        **{
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 64 << 20,
            **settings,
        },
    )


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[octavo.LLM]:
    with make(checkpoint) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm: octavo.LLM) -> list[list[int]]:
    """Tokens of the pixels, each conversation alone."""
    found = [tokens(llm.chat(messages, GREEDY))[0] for messages in CONVERSATIONS]
    assert len({tuple(each) for each in found}) == len(found)
    return found


def tokens(outputs: list[octavo.RequestOutput]) -> list[list[int]]:
    assert [output.error for output in outputs] == [""] * len(outputs)
    return [output.outputs[0].token_ids for output in outputs]


def test_alone_batched_and_cached_give_the_tokens_of_the_image(
    llm: octavo.LLM, expected: list[list[int]], conversations: list[Any]
) -> None:
    assert [tokens(llm.chat(messages, GREEDY))[0] for messages in conversations] == expected
    outputs = llm.chat(conversations, GREEDY)
    assert tokens(outputs) == expected
    for output in outputs:
        assert output.usage is not None
        size = output.usage.prompt_tokens
        assert output.usage.cached_tokens == min(size // 16 * 16, size - 1)
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"block_size": 8, "max_unit_temporal_patches": 1}, id="small-units"),
        pytest.param({"tensor_parallel_size": 2}, id="two-ranks"),
        pytest.param(
            {"tensor_parallel_size": 4, "max_num_batched_tokens": 23},
            id="four-ranks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_setting_gives_the_tokens_of_the_image(
    checkpoint: Path,
    expected: list[list[int]],
    conversations: list[Any],
    settings: dict[str, Any],
) -> None:
    with make(checkpoint, **settings) as llm:
        mixed = [*conversations, *CONVERSATIONS]
        assert tokens(llm.chat(mixed, GREEDY)) == expected * 2


def test_workers_that_end_are_sent_the_embeddings_again(
    checkpoint: Path, expected: list[list[int]], conversations: list[Any]
) -> None:
    with make(checkpoint, max_num_batched_tokens=40) as llm:
        before = llm.engine.worker_pids
        at_steps(llm, {3}, lambda: os.kill(llm.engine.worker_pids[0], signal.SIGKILL))
        assert tokens(llm.chat(conversations, GREEDY)) == expected
        assert llm.engine.worker_pids != before


def test_what_was_used_is_reported_as_for_pixels(llm: octavo.LLM, conversations: list[Any]) -> None:
    pixels = llm.chat(CONVERSATIONS[3], GREEDY)[0].media
    embeds = llm.chat(conversations[3], GREEDY)[0].media
    sampled = replace(pixels[1], frame_indices=(), frame_times=(), sample_fps=None)
    assert list(embeds) == [pixels[0], sampled]
    assert (embeds[1].num_frames, embeds[0].num_frames) == (4, 1)


def test_a_video_of_embeddings_has_the_positions_of_any_video(
    processor: InputProcessor, conversations: list[Any]
) -> None:
    for pixels, embeds in zip(CONVERSATIONS, conversations, strict=True):
        one, other = processor.from_prompt(pixels), processor.from_prompt(embeds)
        assert one.prompt_token_ids == other.prompt_token_ids
        assert one.mrope_positions == other.mrope_positions
        assert one.mrope_position_delta == other.mrope_position_delta
        assert [u.grid_thw for u in one.units] == [u.grid_thw for u in other.units]


def random_embeds(hidden: int, seed: int = 0, grid: Any = (1, 4, 6)) -> octavo.MediaEmbeds:
    rows = grid[0] * grid[1] * grid[2] // 4
    values = np.random.default_rng(seed).standard_normal((rows, hidden)).astype(np.float32)
    return octavo.MediaEmbeds(values, grid)


@pytest.mark.lesson("L04")
def test_prefix_media_two_embeddings_under_one_text(llm: octavo.LLM) -> None:
    """The last number alone differs; what comes before the item is shared, and nothing else."""
    one = random_embeds(llm.engine.model_config.hidden_size, 1)
    values = one.values.copy()
    values[-1, -1] += 1
    text = "The same words over both of them, and long enough for blocks of their own."

    def cached(embeds: octavo.MediaEmbeds, salt: str = "") -> int:
        content = ask(text, {"type": "image", "image": embeds})
        (output,) = llm.chat(content, GREEDY, cache_salt=salt)
        assert output.usage is not None
        prompts.append(output.prompt_token_ids)
        return output.usage.cached_tokens

    prompts: list[Any] = []
    cached(one)
    prompt = prompts[0]
    before = prompt.index(llm.engine.model_config.image_token_id) // 16 * 16
    whole = len(prompt) // 16 * 16
    assert 0 < before < whole - 32
    assert cached(one) == whole
    assert cached(octavo.MediaEmbeds(values, one.grid_thw)) == before
    assert cached(octavo.MediaEmbeds(one.values, (1, 6, 4))) == before
    assert cached(one, salt="mine") == 0  # another tenant's
    assert cached(one, salt="mine") == whole
    assert all(each == prompt for each in prompts)


def test_one_bad_request_is_its_own(
    llm: octavo.LLM, expected: list[list[int]], conversations: list[Any]
) -> None:
    hidden = llm.engine.model_config.hidden_size
    bad = ask("?", {"type": "image", "image": random_embeds(hidden + 1)})
    *good, failed = llm.chat([*conversations, bad], GREEDY)
    assert tokens(good) == expected
    assert failed.outputs[0].finish_reason == "error"
    assert str(hidden) in failed.error and "values" in failed.error


# What an item of embeddings becomes, and what is refused.


def read(processor: InputProcessor, embeds: Any, kind: str = "image", **options: Any) -> Any:
    return processor.from_prompt(ask("?", {"type": kind, kind: embeds, **options}))


@pytest.fixture(scope="module")
def hidden(processor: InputProcessor) -> int:
    return processor.config.vision.hidden_size


@pytest.mark.parametrize("grid", [[1, 4, 6], np.array([1, 4, 6]), torch.tensor([[1, 4, 6]])])
def test_every_dtype_and_form_of_the_same_numbers_is_one_item(
    processor: InputProcessor, hidden: int, grid: Any
) -> None:
    """Numbers that bfloat16 holds: then all of them say the same."""
    numbers = torch.from_numpy(random_embeds(hidden).values).bfloat16().float().clamp(-4, 4)
    numbers[numbers.abs() < 0.01] = 0  # below that float16 rounds
    wide = numbers.numpy().repeat(2, axis=1)
    forms = [
        numbers,
        numbers.bfloat16(),
        numbers.half(),
        numbers.clone().requires_grad_(),
        numbers.numpy(),
        numbers.numpy().astype(np.float16),
        numbers.numpy().astype(">f4"),
        np.asfortranarray(numbers.numpy()),
        wide[:, ::2],
    ]
    units = [read(processor, octavo.MediaEmbeds(form, grid)).units for form in forms]
    assert all(len(some) == 1 for some in units)
    assert len({some[0].media_hash for some in units}) == 1
    for (unit,) in units:
        assert unit.pixels is None and unit.grid_thw == (1, 4, 6)
        assert unit.embeds.dtype == np.float32 and unit.embeds.flags.c_contiguous
        assert np.array_equal(unit.embeds, numbers.numpy())


def test_a_video_is_cut_in_units(processor: InputProcessor, hidden: int) -> None:
    embeds = random_embeds(hidden, grid=(10, 4, 2))
    ready = read(processor, embeds, "video")
    assert [unit.grid_thw for unit in ready.units] == [(4, 4, 2), (4, 4, 2), (2, 4, 2)]
    assert np.array_equal(np.concatenate([unit.embeds for unit in ready.units]), embeds.values)
    (info,) = (item.info for item in ready.media)
    assert (info.num_frames, info.height, info.width, info.num_tokens) == (20, 56, 28, 20)
    assert (info.grid_thw, info.frame_times, info.sample_fps) == ((10, 4, 2), (), None)


def test_what_the_caller_changes_afterwards_changes_nothing(
    processor: InputProcessor, hidden: int
) -> None:
    embeds = random_embeds(hidden)
    before = embeds.values.copy()
    (unit,) = read(processor, embeds).units
    embeds.values[:] = 0
    assert np.array_equal(unit.embeds, before)


@pytest.mark.lesson("L05")
def test_media_hash_of_embeddings(processor: InputProcessor, hidden: int) -> None:
    """Numbers, grid and kind are in it; and it is never the hash of pixels of the same bytes."""
    embeds = random_embeds(hidden)
    other = octavo.MediaEmbeds(embeds.values, (1, 6, 4))
    negative = octavo.MediaEmbeds(-embeds.values, (1, 4, 6))
    hashes = [read(processor, each).units[0].media_hash for each in (embeds, other, negative)]
    hashes.append(read(processor, embeds, "video").units[0].media_hash)
    assert len(set(hashes)) == 4 and {len(each) for each in hashes} == {32}
    raw = np.zeros((1, 8), np.float32)
    assert embeds_hash("image", raw, (1, 2, 2)) != media_hash("image", raw.view(np.uint8))


VALUES = np.ones((6, 2), np.float32)  # its width is set to the model's


def with_number(number: float) -> np.ndarray:
    changed = VALUES.copy()
    changed[3, 1] = number
    return changed


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (with_number(np.nan), "NaN"),
        (with_number(np.inf), "infinite"),
        (with_number(-np.inf), "infinite"),
        (with_number(7e4), "70000.*65504"),
        (with_number(-7e4), "70000.*65504"),
        (torch.from_numpy(with_number(np.nan)).bfloat16(), "NaN"),
        (VALUES.astype(np.float64), "float64.*float32"),
        (VALUES.astype(np.int32), "int32"),
        (VALUES.astype(object), "object"),
        (VALUES.astype(np.complex64), "complex64"),
        (torch.from_numpy(VALUES).double(), "float64"),
        (torch.from_numpy(VALUES).to_sparse(), "must be a numpy array"),
        (torch.empty(6, 2, device="meta"), "cannot be read"),
        (VALUES.tolist(), "list"),
        (b"\0" * 48, "bytes"),
        (None, "NoneType"),
        (VALUES[0], r"shape \(2,\)"),
        (VALUES[None], r"shape \(1, 6, 2\)"),
        (VALUES[:, :1], "values per token"),
        (VALUES[:0], "0 tokens"),
        (VALUES[:5], "5 tokens.*6"),
        (np.ones((7, 2), np.float32), "7 tokens.*6"),
    ],
)
def test_values_that_are_rejected(
    processor: InputProcessor, hidden: int, values: Any, words: str
) -> None:
    """Each names the field, and costs nobody else anything."""
    if getattr(values, "ndim", 0) and values.shape[-1] == 2:
        values = widened(values, hidden)
        words = words.replace("(2,", f"({hidden},").replace("6, 2", f"6, {hidden}")
    with pytest.raises(InputError, match=words) as caught:
        read(processor, octavo.MediaEmbeds(values, (1, 4, 6)))
    assert caught.value.field == "messages[0].content[0].image.values"


def widened(values: Any, hidden: int) -> Any:
    """`values` over the model's hidden size, in the form that they have."""
    if isinstance(values, np.ndarray):
        return np.concatenate([values] * (hidden // 2), axis=-1)
    if values.layout != torch.strided or values.device.type == "meta":
        made = torch.empty(6, hidden, device=values.device)
        return made.to_sparse() if values.layout != torch.strided else made
    return torch.cat([values] * (hidden // 2), dim=-1)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ((1, 4), "three"),
        ((1, 4, 6, 1), "three"),
        ("146", "three"),
        (None, "three"),
        (146, "three"),
        (np.ones((3, 1), np.int64), "three"),
        ((1.0, 4, 6), "integer"),
        ((True, 4, 6), "integer"),
        (np.array([1.0, 4.0, 6.0]), "integer"),
        ((0, 4, 6), "from 1"),
        ((1, -4, -6), "from 1"),
        ((1, 10**400, 6), "from 1"),
        ((1, 3, 8), "multiples of 2"),
        ((1, 4, 7), "multiples of 2"),
        ((2, 4, 6), "t = 1"),
        ((1, 1 << 20, 1 << 20), "max-media-pixels"),
    ],
)
def test_grids_that_are_rejected(
    processor: InputProcessor, hidden: int, grid: Any, words: str
) -> None:
    values = random_embeds(hidden).values
    with pytest.raises(InputError, match=words) as caught:
        read(processor, octavo.MediaEmbeds(values, grid))
    assert caught.value.field == "messages[0].content[0].image.grid_thw"


def test_limits_hold_for_embeddings_too(checkpoint: Path, hidden: int) -> None:
    config, preprocess = ModelConfig.from_dir(checkpoint), PreprocessConfig.from_dir(checkpoint)
    small = InputProcessor(checkpoint, config, preprocess, 64)
    with pytest.raises(InputError, match=r"100 tokens of embeddings.*max_model_len=64"):
        read(small, random_embeds(hidden, grid=(1, 20, 20)))
    with pytest.raises(InputError, match="max-video-frames"):
        read(small, random_embeds(hidden, grid=(1025, 2, 2)), "video")
    limits = replace(small.limits, max_media_bytes=6 * hidden * 4 - 1)
    tight = replace(small.loader, limits=limits)
    small.loader = tight
    with pytest.raises(InputError, match="max-media-bytes"):
        read(small, random_embeds(hidden))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("image", {"max_pixels": 50176}),
        ("image", {"min_pixels": 3136}),
        ("image", {"resized_height": 56, "resized_width": 84}),
        ("video", {"fps": 2}),
        ("video", {"nframes": 2}),
        ("video", {"total_pixels": 50176}),
        ("video", {"video_start": 0}),
    ],
)
def test_options_beside_embeddings_are_rejected(
    processor: InputProcessor, hidden: int, kind: str, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        read(processor, random_embeds(hidden), kind, **options)


def test_embeddings_are_no_frame_of_a_list(processor: InputProcessor, hidden: int) -> None:
    with pytest.raises(InputError, match="MediaEmbeds"):
        read(processor, [random_embeds(hidden)] * 2, "video")
