"""Every message form of the Qwen2-VL model card works as it stands, but for where files lie."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.engine.errors import InputError

PARAMS = octavo.SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card's `/path/to`."""
    folder = tmp_path_factory.mktemp("card")
    rng = np.random.default_rng(0)
    for name in ("image", "image1", "image2", "frame1", "frame2", "frame3", "frame4", "your-image"):
        pixels = rng.integers(0, 256, (120, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    with av.open(str(folder / "video1.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for i in range(30):
            frame = np.full((96, 128, 3), i * 8, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[octavo.LLM]:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with octavo.LLM(checkpoint, dtype="float32", kv_cache_memory_bytes=64 << 20) as llm:
        yield llm


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def media_of(llm: octavo.LLM, messages: list[dict[str, Any]], **more: Any) -> list[Any]:
    out = llm.chat(messages, PARAMS, **more)[0]
    assert out.outputs[0].token_ids
    return [(info.kind, info.num_frames, info.height, info.width) for info in out.media]


def test_quickstart(llm: octavo.LLM, folder: Path) -> None:
    messages = user(
        {"type": "image", "image": f"file://{folder}/image.jpg"}, text("Describe this image.")
    )
    assert media_of(llm, messages) == [("image", 1, 112, 84)]


def test_without_qwen_vl_utils(llm: octavo.LLM, folder: Path) -> None:
    conversation = user({"type": "image"}, text("Describe this image."))
    image = Image.open(folder / "image.jpg")
    assert media_of(llm, conversation, images=[image]) == [("image", 1, 112, 84)]
    with pytest.raises(InputError):
        llm.chat(conversation, PARAMS)
    with pytest.raises(InputError):
        llm.chat(conversation, PARAMS, images=[image, image])


def test_multi_image(llm: octavo.LLM, folder: Path) -> None:
    messages = user(
        {"type": "image", "image": f"file://{folder}/image1.jpg"},
        {"type": "image", "image": f"file://{folder}/image2.jpg"},
        text("Identify the similarities between these images."),
    )
    assert len(media_of(llm, messages)) == 2


def test_video_of_frames(llm: octavo.LLM, folder: Path) -> None:
    frames = [f"file://{folder}/frame{i}.jpg" for i in (1, 2, 3, 4)]
    messages = user({"type": "video", "video": frames, "fps": 1.0}, text("Describe this video."))
    assert media_of(llm, messages)[0][:2] == ("video", 4)


def test_video_of_a_file(llm: octavo.LLM, folder: Path) -> None:
    messages = user(
        {
            "type": "video",
            "video": f"file://{folder}/video1.mp4",
            "max_pixels": 360 * 420,
            "fps": 1.0,
        },
        text("Describe this video."),
    )
    kind, frames, height, width = media_of(llm, messages)[0]
    assert (kind, frames) == ("video", 4)  # 3 s at 1 a second, but at least 4
    assert height * width <= 360 * 420


def test_batch(llm: octavo.LLM, folder: Path) -> None:
    messages1 = user(
        {"type": "image", "image": f"file://{folder}/image1.jpg"},
        {"type": "image", "image": f"file://{folder}/image2.jpg"},
        text("What are the common elements in these pictures?"),
    )
    messages2 = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Who are you?"},
    ]
    outputs = llm.chat([messages1, messages2, messages1], PARAMS)
    assert [len(output.media) for output in outputs] == [2, 0, 2]
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids


def test_path_and_base64(llm: octavo.LLM, folder: Path) -> None:
    path = folder / "your-image.jpg"
    encoded = base64.b64encode(path.read_bytes()).decode()
    forms = [f"file://{path}", str(path), path, path.read_bytes(), Image.open(path)]
    forms += [f"data:image;base64,{encoded}", f"data:image/jpeg;base64,{encoded}"]
    asked = [user({"type": "image", "image": form}, text("Describe this.")) for form in forms]
    outputs = llm.chat(asked, PARAMS)
    assert not [output.error for output in outputs if output.error]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


@pytest.mark.lesson("L19")
def test_ssrf_a_url_is_not_fetched_and_says_what_to_do(llm: octavo.LLM) -> None:
    messages = user(
        {"type": "image", "image": "http://path/to/your/image.jpg"}, text("Describe this image.")
    )
    with pytest.raises(InputError, match="--allow-media-domains"):
        llm.chat(messages, PARAMS)


def test_resolution_per_item_and_for_all(llm: octavo.LLM, folder: Path) -> None:
    path = f"file://{folder}/your-image.jpg"
    exact = {"type": "image", "image": path, "resized_height": 280, "resized_width": 420}
    limits = {"type": "image", "image": path, "min_pixels": 50176, "max_pixels": 50176}
    assert media_of(llm, user(exact, text("?"))) == [("image", 1, 280, 420)]
    assert media_of(llm, user(limits, text("?"))) == [("image", 1, 280, 196)]
    settings = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
    low, high = 256 * 28 * 28, 1280 * 28 * 28
    with octavo.LLM(llm.engine.config.model, min_pixels=low, max_pixels=high, **settings) as wide:
        plain = user({"type": "image", "image": path}, text("?"))
        _, _, height, width = media_of(wide, plain)[0]
        assert low <= height * width <= high


def test_pil_bytes_in_other_formats(llm: octavo.LLM) -> None:
    still = Image.new("RGB", (60, 60), "red")
    forms = []
    for name in ("PNG", "WEBP", "BMP", "GIF", "TIFF"):
        buffer = io.BytesIO()
        still.save(buffer, name)
        forms.append(buffer.getvalue())
    asked = [user({"type": "image", "image": form}, text("?")) for form in forms]
    outputs = llm.chat(asked, PARAMS)
    assert [output.error for output in outputs] == [""] * len(forms)
