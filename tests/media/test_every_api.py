"""Images and videos through every api: LLM, AsyncLLM, Client over gRPC, the protocol, the CLI."""

import base64
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served
from octavo.benchmarks.media.cases import encoded, mp4, noise
from octavo.engine.cli.main import app
from octavo.engine.client import media
from octavo.engine.client.client import Client, ClientError
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.embeds import MediaEmbeds
from octavo.engine.media.item import MediaInfo
from octavo.engine.server.grpc_api.media import read_source
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
PARAMS = octavo.SamplingParams(**GREEDY)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 16 << 20,
}
SIZES = {"min_pixels": 3136, "max_pixels": 12544}

Answer = tuple[list[int], list[dict[str, Any]]]  # tokens, and what was made of the media
Ask = Callable[[dict[str, Any]], Answer]  # asks about one part


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[octavo.LLM]:
    with octavo.LLM(checkpoint, allowed_media_domains="a.org", **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the servers may read."""
    folder = tmp_path_factory.mktemp("media files")
    noise(84, 56).save(folder / "a picture.png")
    (folder / "a clip.mp4").write_bytes(mp4(20))
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, files: Path) -> Iterator[Served]:
    places: dict[str, Any] = {"allowed_media_paths": (files,), "allowed_media_domains": ("a.org",)}
    served = Served(checkpoint, **places, **SETTINGS)
    yield served
    served.wait_empty()
    served.close()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]


def image(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **SIZES, **options}


def video(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **SIZES, **options}


NAMES = ("height", "width", "num_frames", "num_tokens", "grid_thw", "frame_indices", "sample_fps")


def echo(info: MediaInfo | pb.ResolvedMedia) -> dict[str, Any]:
    """What was used, from either side of the protocol."""
    found = {name: getattr(info, name) for name in (*NAMES, "frame_times")}
    found["sample_fps"] = found["sample_fps"] or None  # absent is zero in the protocol
    return {k: v if isinstance(v, int | float | None) else tuple(v) for k, v in found.items()}


def through_llm(llm: octavo.LLM, part: dict[str, Any]) -> Answer:
    out = llm.chat(ask(part), PARAMS)[0]
    return out.outputs[0].token_ids, list(map(echo, out.media))


def through_async(served: Served, part: dict[str, Any]) -> Answer:
    async def run() -> Answer:
        deltas = [delta async for delta in served.engine.chat(ask(part), PARAMS)]
        return [t for d in deltas for t in d.token_ids], list(map(echo, deltas[0].media))

    return served.run(run())


def through_client(client: Client, part: dict[str, Any]) -> Answer:
    deltas = list(client.chat(ask(part), **GREEDY))
    return [t for d in deltas for t in d.token_ids], list(map(echo, deltas[0].media))


def through_proto(served: Served, item: pb.MediaItem) -> Answer:
    parts = [pb.ContentPart(media=item), pb.ContentPart(text="?")]
    talk = pb.Conversation(messages=[pb.Message(role="user", content=parts)])
    request = pb.GenerateRequest(conversation=talk, sampling=pb.SamplingParams(**GREEDY))
    with grpc.insecure_channel(served.address) as channel:
        deltas = list(octavo_pb2_grpc.InferenceStub(channel).Generate(request))
    return [t for d in deltas for t in d.token_ids], list(map(echo, deltas[0].media))


def refused(served: Served, item: pb.MediaItem, code: str = "INVALID_ARGUMENT") -> str:
    """The text with which a server refuses an item."""
    with pytest.raises(grpc.RpcError) as error:
        through_proto(served, item)
    assert error.value.code().name == code
    return error.value.details()


@pytest.fixture
def apis(llm: octavo.LLM, served: Served, client: Client) -> list[Ask]:
    return [
        lambda part: through_llm(llm, part),
        lambda part: through_async(served, part),
        lambda part: through_client(client, part),
    ]


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def file_uri(path: Path) -> str:
    return f"file://{str(path).replace(' ', '%20')}"


def image_sources(files: Path) -> dict[str, Any]:
    path = files / "a picture.png"
    pixels = np.asarray(noise(84, 56))
    return {
        "path": str(path),
        "Path": path,
        "file URI": file_uri(path),
        "data URI": data_uri(path.read_bytes(), "image/png"),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "PIL": noise(84, 56),
        "numpy": pixels,
        "numpy, strided": np.concatenate([pixels, pixels], axis=1)[:, :84],
        "torch": torch.from_numpy(pixels.copy()),
        "file of the server": octavo.ServerFile(str(path)),
    }


def test_every_source_of_an_image_through_every_api(apis: list[Ask], files: Path) -> None:
    sources = image_sources(files)
    expected = apis[0](image(sources["PIL"]))
    assert len(expected[0]) == 8 and expected[1][0]["grid_thw"] == (1, 4, 6)
    assert apis[0](image(noise(84, 56, seed=1)))[0] != expected[0]  # the tokens tell pictures apart
    for name, source in sources.items():
        for api in apis:
            assert api(image(source)) == expected, name


def test_openai_s_parts_through_every_api(
    apis: list[Ask], llm: octavo.LLM, client: Client, files: Path
) -> None:
    """(Over HTTP: server/test_http.py.)"""
    path = files / "a picture.png"
    uri, clip = data_uri(path.read_bytes(), "image/png"), str(files / "a clip.mp4")
    for api in apis:
        expected = api(image(uri))
        for part in (
            {"type": "image_url", "image_url": {"url": uri, **SIZES}},
            {"type": "image_url", "image_url": {"url": uri, "detail": "high"}, **SIZES},
            {"type": "image_url", "image_url": str(path), **SIZES},
        ):
            assert api(part) == expected
        wanted = api(video(clip, fps=2))
        assert api({"type": "video_url", "video_url": {"url": clip, "fps": 2}, **SIZES}) == wanted
    wrong: Any = ask({"type": "image_url", "image_url": {"uri": uri}})
    for chat in (llm.chat, client.chat):
        with pytest.raises((ValueError, ClientError)) as caught:
            list(chat(wrong))
        assert caught.value.field == "messages[0].content[0].image_url.url"  # type: ignore[union-attr]
        assert "under 'url'; it has 'uri'" in str(caught.value)
    with pytest.raises(ValueError, match=r"^messages\[0\]\.content\[0\]\.image_url\.url: "):
        llm.chat(ask({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}))


def test_every_source_of_a_video_through_every_api(apis: list[Ask], files: Path) -> None:
    path = files / "a clip.mp4"
    sources = [
        str(path),
        path,
        file_uri(path),
        data_uri(path.read_bytes(), "video/mp4"),
        path.read_bytes(),
        octavo.ServerFile(str(path)),
    ]
    expected = apis[0](video(path, fps=2))
    assert expected[1][0]["num_frames"] == 4
    assert expected[1][0]["frame_times"] == (0.0, 0.6, 1.3, 1.9)
    for source in sources:
        for api in apis:
            assert api(video(source, fps=2)) == expected, source


def test_a_list_of_frames_of_any_source_through_every_api(apis: list[Ask], files: Path) -> None:
    pictures = [noise(56, 56, seed) for seed in range(5)]
    pictures[3].save(files / "3.png")
    mixed = [
        pictures[0],
        encoded(pictures[1]),
        data_uri(encoded(pictures[2]), "image/png"),
        files / "3.png",
        np.asarray(pictures[4]),
    ]
    whole = np.stack([np.asarray(picture) for picture in pictures])
    expected = apis[0](video(pictures, fps=5))
    assert expected[1][0]["frame_indices"] == (0, 1, 2, 3, 4, 4)
    assert expected[1][0]["frame_times"] == pytest.approx((0.0, 0.2, 0.4, 0.6, 0.8, 0.8))
    for source in (pictures, tuple(pictures), mixed, whole, torch.from_numpy(whole)):
        for api in apis:
            assert api(video(source, fps=5)) == expected


def test_urls_through_every_api(
    apis: list[Ask], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each comes to the one function that fetches, with the domains that the engine was told."""
    asked: list[tuple[str, Any]] = []
    picture = encoded(noise(84, 56))

    def fetch(url: str, domains: Any, limits: Any, field: str) -> io.BytesIO:
        asked.append((url, tuple(domains)))
        return io.BytesIO(picture)

    monkeypatch.setattr("octavo.engine.media.source.fetch", fetch)
    url = "https://a.org/a%20picture.png"
    for api in apis:
        assert api(image(url)) == apis[0](image(picture))
        assert api(video([url, picture])) == apis[0](video([picture] * 2))
    assert asked == [(url, ("a.org",))] * len(asked) and len(asked) >= 2 * len(apis)
    asked.clear()
    chat("--model", str(checkpoint), "--image", "http://B.net/x", "?")  # who types it wants it
    assert asked == [("http://B.net/x", ("b.net",))]


def test_the_protocol_s_forms(served: Served, llm: octavo.LLM, files: Path) -> None:
    """What the client never writes is read all the same."""
    pictures = [noise(56, 56, seed) for seed in range(4)]
    expected = through_llm(llm, video(pictures))
    options = pb.MediaOptions(**SIZES)
    data = [encoded(picture) for picture in pictures]
    frames = [
        pb.Frames(data=data),
        pb.Frames(frames=[pb.Frame(data=each) for each in data]),
        pb.Frames(frames=[pb.Frame(url=data_uri(each, "image/png")) for each in data]),
        pb.Frames(
            frames=[
                pb.Frame(pixels=pb.Pixels(data=p.tobytes(), shape=(56, 56, 3))) for p in pictures
            ]
        ),
    ]
    for each in frames:
        item = pb.MediaItem(kind=pb.MEDIA_KIND_VIDEO, frames=each, options=options)
        assert through_proto(served, item) == expected
    picture = encoded(noise(84, 56))
    item = pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE, data=picture, options=options)
    assert through_proto(served, item) == through_llm(llm, image(picture))


def test_embeddings_through_every_api(apis: list[Ask], served: Served) -> None:
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    still = {"type": "image", "image": octavo.MediaEmbeds(values, (1, 4, 6))}
    moving = {"type": "video", "video": octavo.MediaEmbeds(torch.from_numpy(values), (3, 4, 2))}
    for part, size in ((still, (56, 84)), (moving, (56, 28))):
        answers = [api(part) for api in apis]
        assert answers[1:] == answers[:1] * 2
        assert (answers[0][1][0]["height"], answers[0][1][0]["width"]) == size
    other = {"type": "image", "image": octavo.MediaEmbeds(-values, (1, 4, 6))}
    assert apis[0](still)[0] != apis[0](other)[0]
    item = embeddings(values.tobytes(), "float32", (6, 64), (1, 4, 6))
    assert through_proto(served, item) == apis[0](still)
    wrong = embeddings(values.tobytes(), "float32", (3, 128), (1, 4, 6))
    assert "64 values per token" in refused(served, wrong)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of", ["numpy", "big-endian", "torch"])
def test_embeddings_travel_as_they_are(dtype: str, of: str) -> None:
    values = torch.randn((6, 64), generator=torch.Generator().manual_seed(0))
    values = values.to(getattr(torch, dtype))
    given: Any = values if of == "torch" else values.float().numpy()
    if of != "torch":
        given = given.astype("float32" if dtype == "bfloat16" else dtype)
    if of == "big-endian":
        given = given.astype(given.dtype.newbyteorder(">"))
    part = {"type": "image", "image": MediaEmbeds(given, (1, 4, 6))}
    item = pb.MediaItem.FromString(media.media_item(part).SerializeToString())
    found = read_source(item, "image")
    assert isinstance(found, MediaEmbeds)
    assert tuple(found.grid_thw) == (1, 4, 6)
    np.testing.assert_array_equal(found.values, values.float().numpy())


def raw(data: bytes, shape: Any, kind: int = pb.MEDIA_KIND_IMAGE) -> pb.MediaItem:
    return pb.MediaItem(kind=kind, pixels=pb.Pixels(data=data, shape=shape))


def embeddings(data: bytes, dtype: str, shape: Any, grid: Any) -> pb.MediaItem:
    given = pb.Embeddings(data=data, dtype=dtype, shape=shape, grid_thw=grid)
    return pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE, embeddings=given)


@pytest.mark.lesson("L25")
@pytest.mark.parametrize(
    ("item", "words"),
    [
        (raw(b"", ()), "pixels.shape: []: must be (height, width, channels)"),
        (raw(bytes(48), (4, 4)), "pixels.shape"),
        (raw(bytes(48), (1, 4, 4, 3)), "pixels.shape"),
        (raw(b"", (0, 4, 3)), "pixels.shape"),
        (raw(bytes(47), (4, 4, 3)), "pixels.data: has 47 bytes; shape [4, 4, 3] needs 48"),
        (raw(bytes(49), (4, 4, 3)), "pixels.data"),
        (raw(bytes(48), (2**32 - 1, 2**32 - 1, 2**32 - 1)), "pixels.data"),
        (
            raw(bytes(48), (4, 4, 3), pb.MEDIA_KIND_VIDEO),
            "must be (frames, height, width, channels)",
        ),
        (raw(bytes(80), (4, 4, 5)), "channels"),
        (embeddings(bytes(8), "float64", (1, 1), (1, 2, 2)), "embeddings.dtype: 'float64'"),
        (embeddings(bytes(8), "", (1, 1), (1, 2, 2)), "embeddings.dtype"),
        (embeddings(bytes(8), "O", (1, 1), (1, 2, 2)), "float32, float16, bfloat16"),
        (embeddings(bytes(256), "float32", (1, 64), (1, 2)), "embeddings.grid_thw"),
        (embeddings(bytes(256), "float32", (1, 64), (0, 2, 2)), "embeddings.grid_thw"),
        (embeddings(bytes(256), "float32", (64,), (1, 2, 2)), "embeddings.shape"),
        (embeddings(bytes(256), "float16", (1, 64), (1, 2, 2)), "embeddings.data: has 256 bytes"),
        (embeddings(bytes(255), "float32", (1, 64), (1, 2, 2)), "embeddings.data"),
    ],
)
def test_torch_load_raw_numbers_are_checked(served: Served, item: pb.MediaItem, words: str) -> None:
    assert words in refused(served, item)


@pytest.mark.lesson("L25")
@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=64),
    shape=st.lists(st.one_of(st.integers(0, 5), st.just(2**32 - 1)), max_size=5),
    grid=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "uint8", "object", ""]),
    form=st.sampled_from(["pixels", "embeddings"]),
    kind=st.sampled_from([pb.MEDIA_KIND_IMAGE, pb.MEDIA_KIND_VIDEO]),
)
def test_torch_load_raw_numbers_of_any_kind_are_read_or_rejected(
    data: bytes, shape: list[int], grid: list[int], dtype: str, form: str, kind: Any
) -> None:
    if form == "pixels":
        item = pb.MediaItem(kind=kind, pixels=pb.Pixels(data=data, shape=shape))
    else:
        given = pb.Embeddings(data=data, dtype=dtype, shape=shape, grid_thw=grid)
        item = pb.MediaItem(kind=kind, embeddings=given)
    try:
        found = read_source(item, "media[0]")
    except InputError as error:
        assert error.field.startswith(f"media[0].{form}.")
        return
    values = found if form == "pixels" else found.values
    assert values.shape == tuple(shape)
    if dtype != "bfloat16" or form == "pixels":
        assert values.tobytes() == data


IMAGE_OPTIONS: list[dict[str, Any]] = [
    {"min_pixels": 50176, "max_pixels": None},
    {"max_pixels": 3136},
    {"resized_height": 112, "resized_width": 28, **dict.fromkeys(SIZES)},
]
VIDEO_OPTIONS: list[dict[str, Any]] = [
    {"min_pixels": 6272},
    {"min_pixels": None, "max_pixels": 1568},
    {"resized_height": 56, "resized_width": 140, **dict.fromkeys(SIZES)},
    {"fps": 5},
    {"nframes": 10},
    {"min_frames": 8},
    {"fps": 10, "max_frames": 6},
    {"total_pixels": 12544, "max_pixels": None, "nframes": 8},
    {"video_start": 0.5, "nframes": 4},
    {"video_end": 1.2, "nframes": 4},
    {"video_start": 0.25, "video_end": 1.25, "nframes": 2},
]


@pytest.mark.lesson("L09")
@pytest.mark.parametrize(
    "options",
    [("image", o) for o in IMAGE_OPTIONS] + [("video", o) for o in VIDEO_OPTIONS],
    ids=str,
)
def test_pixels_ignored_every_option_is_used_and_echoed_at_every_api(
    apis: list[Ask], options: tuple[str, dict[str, Any]]
) -> None:
    kind, beside = options
    make, source = (image, noise(84, 56)) if kind == "image" else (video, mp4(20))
    answers = [api(make(source, **beside)) for api in apis]
    assert answers[1:] == answers[:1] * 2
    assert answers[0][1] != apis[0](make(source))[1], "it changes nothing"


@pytest.mark.lesson("L09")
@pytest.mark.parametrize(
    ("part", "field"),
    [
        (image(b"x", max_pixel=1), "max_pixel"),
        (image(b"x", fps=1), "fps"),
        (image(b"x", min_pixels=3, max_pixels=2), "min_pixels"),
        (image(b"x", resized_height=28), "resized_height"),
        (image(b"x", resized_height=280, resized_width=280), "resized_height"),
        (image(b"x", max_pixels=0), "max_pixels"),
        (video(b"x", fps=1, nframes=2), "fps"),
        (video(b"x", nframes=2, min_frames=4), "nframes"),
        (video(b"x", nframes=8, max_frames=4), "nframes"),
        (video(b"x", min_frames=8, max_frames=4), "min_frames"),
        (video(b"x", video_start=2, video_end=1), "video_start"),
        (video(b"x", video_start=float("nan")), "video_start"),
        (video(b"x", fps=float("inf")), "fps"),
        (video(b"x", total_pixels=-1), "total_pixels"),
    ],
)
def test_pixels_ignored_unknown_and_contradictory_options(
    apis: list[Ask], part: dict[str, Any], field: str
) -> None:
    for api in apis:
        with pytest.raises((InputError, ClientError)) as error:
            api(part)
        assert re.search(rf"\b{field}\b", str(error.value)), error.value
        assert getattr(error.value, "code", "INVALID_ARGUMENT") == "INVALID_ARGUMENT"


@pytest.mark.lesson("L09")
def test_pixels_ignored_an_option_of_a_later_protocol(served: Served) -> None:
    later = pb.MediaOptions.FromString(b"\xf8\x01\x05")  # field 31
    item = pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE, data=encoded(noise()), options=later)
    assert "options" in refused(served, item, "UNIMPLEMENTED")


LIMITS: dict[str, Any] = {
    "max_media_bytes": 30_000,
    "max_media_pixels": 40_000,
    "max_video_frames": 6,
    "max_video_seconds": 3,
    "max_media_items": 2,
}


@pytest.fixture(scope="module")
def tight(checkpoint: Path) -> Iterator[list[Ask]]:
    """APIs of engines with tight limits."""
    served = Served(checkpoint, **LIMITS, **SETTINGS)
    with octavo.LLM(checkpoint, **LIMITS, **SETTINGS) as llm, Client(served.address) as client:
        yield [
            lambda part: through_llm(llm, part),
            lambda part: through_async(served, part),
            lambda part: through_client(client, part),
        ]
    served.wait_empty()
    served.close()


@pytest.mark.lesson("L22")
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("max_media_bytes", image(encoded(noise(200, 200)))),
        ("max_media_bytes", image(data_uri(encoded(noise(200, 200)), "image/png"))),
        ("max_media_bytes", video([encoded(noise(200, 200))])),
        ("max_media_pixels", image(encoded(Image.new("RGB", (201, 200))))),
        ("max_media_pixels", image(np.zeros((200, 201, 3), np.uint8))),
        ("max_media_pixels", image(Image.new("RGB", (201, 200)))),
        ("max_media_pixels", video([encoded(Image.new("RGB", (201, 200)))])),
        ("max_media_pixels", video(np.zeros((2, 200, 201, 3), np.uint8))),
        ("max_media_pixels", video(mp4(4, size=(208, 208)))),
        ("max_video_frames", video(mp4(20), nframes=8)),
        ("max_video_frames", video([noise(28, 28)] * 7)),
        ("max_video_frames", video(np.zeros((7, 28, 28, 3), np.uint8))),
        ("max_video_seconds", video(mp4(40))),
    ],
)
def test_bombs_one_limits_object_at_every_api(
    tight: list[Ask], name: str, part: dict[str, Any]
) -> None:
    flag = "--" + name.replace("_", "-")
    for api in tight:
        with pytest.raises((InputError, ClientError)) as error:
            api(part)
        assert flag in str(error.value)
        assert getattr(error.value, "code", "INVALID_ARGUMENT") == "INVALID_ARGUMENT"
    assert len(tight[0](image(noise(84, 56)))[0]) == 8  # what is within them passes


@pytest.mark.lesson("L22")
def test_bombs_items_of_a_request(checkpoint: Path) -> None:
    served = Served(checkpoint, **LIMITS, **SETTINGS)
    part = image(noise(28, 28))
    with Client(served.address) as client:
        assert list(client.chat(ask(part, part), **GREEDY))
        with pytest.raises(ClientError, match="--max-media-items"):
            list(client.chat(ask(part, part, part), **GREEDY))
    served.close()


def test_what_media_took_is_reported(llm: octavo.LLM, served: Served, client: Client) -> None:
    out, text = (llm.chat(ask(*parts), PARAMS)[0] for parts in ([image(noise())], []))
    assert out.media_times is not None and text.media_times is not None
    assert out.media_times.queued_s >= 0 and out.media_times.spent_s > 0
    assert (text.media_times.queued_s, text.media_times.spent_s) == (0, 0)

    async def first() -> list[Any]:
        return [d.media_times async for d in served.engine.chat(ask(image(noise())), PARAMS)]

    times = served.run(first())
    assert times[0].spent_s > 0 and set(times[1:]) == {None}  # on the first delta alone
    deltas = list(client.chat(ask(image(noise())), **GREEDY))
    assert deltas[0].media_times is not None and deltas[0].media_times.spent_s > 0
    assert {delta.media_times for delta in deltas[1:]} == {None}


def chat(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["chat", "--max-tokens", "8", "--temperature", "0", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_line(llm: octavo.LLM, served: Served, checkpoint: Path, files: Path) -> None:
    """Of a server, and of a model loaded here."""
    params = replace(PARAMS, ignore_eos=False)
    path, clip = files / "a picture.png", files / "a clip.mp4"
    pictures = [str(path), file_uri(path), data_uri(path.read_bytes(), "image/png")]
    options = ["--image-option", "max_pixels=3136"]
    beside = ["--video-option", "nframes=4"]
    for name, value in SIZES.items():
        beside += ["--video-option", f"{name}={value}"]

    def check(api: list[str], llm: octavo.LLM, pictures: list[str]) -> None:
        still, moving = (
            llm.chat(ask(part), params)[0].outputs[0].text + "\n"
            for part in (
                {"type": "image", "image": path, "max_pixels": 3136},
                video(clip, nframes=4),
            )
        )
        assert still != moving
        for source in pictures:
            assert chat(*api, "--image", source, *options, "?") == still
        assert chat(*api, "--video", str(clip), *beside, "?") == moving

    check(["--server", served.address], llm, pictures)
    with octavo.LLM(checkpoint) as here:  # in the precision that `chat` takes
        check(["--model", str(checkpoint)], here, pictures[1:2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image-option", "max_pixels", "?"], "--image-option max_pixels: must be NAME=VALUE"),
        (["--video-option", "fps=fast", "?"], "--video-option fps=fast"),
        (["--video-option", "fps=1", "--video-option", "fps=2", "?"], "given twice"),
        (["--image-option", "image=1", "?"], "are not options"),
    ],
)
def test_options_on_the_command_line_are_checked(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["chat", "--server", "127.0.0.1:1", *arguments])
    assert done.exit_code == 2 and words in done.output


def test_what_is_too_large_for_a_message(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(media, "MAX_MESSAGE_BYTES", 100_000)
    (tmp_path / "big.mp4").write_bytes(bytes(100_001))
    big = np.zeros((200, 200, 3), np.uint8)
    half = image(np.zeros((130, 130, 3), np.uint8))
    for parts in ([video(tmp_path / "big.mp4")], [image(big)], [image(bytes(100_001))], [half] * 2):
        with pytest.raises(
            ClientError, match=r"--allow-media-domains.*octavo\.ServerFile"
        ) as error:
            client.chat(ask(*parts), **GREEDY)
        assert error.value.code == "INVALID_ARGUMENT"
    assert list(client.chat(ask(half), **GREEDY))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (image(np.zeros((4, 4, 3))), "an array of float64: must be uint8"),
        (image(torch.zeros((3, 4, 4))), "an array of float32: must be uint8"),
        (image(octavo.ServerFile("a.png")), "must be an absolute path"),
        (image(7), "unsupported type int; pass a path"),
        (image("a\0b"), "null"),
        (image(MediaEmbeds([1.0], (1, 2, 2))), "must be a numpy or torch array"),
        (image(MediaEmbeds(np.zeros((1, 64)), (1, "2", 2))), "grid_thw"),
    ],
)
def test_sources_that_cannot_travel(client: Client, part: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=re.escape(words)):
        client.chat(ask(part), **GREEDY)


@pytest.mark.lesson("L21")
def test_local_files_of_a_server(client: Client, served: Served, tmp_path: Path) -> None:
    """A file of the server's is read under a root alone, whatever the client calls it."""
    noise().save(tmp_path / "secret.png")
    for source in (
        octavo.ServerFile(str(tmp_path / "secret.png")),
        octavo.ServerFile("/etc/passwd"),
    ):
        for part in (image(source), video([source])):
            with pytest.raises(ClientError, match="--allow-media-path"):
                list(client.chat(ask(part), **GREEDY))
    for url in (str(tmp_path / "secret.png"), "/etc/passwd", f"file://{tmp_path}/secret.png"):
        item = pb.MediaItem(kind=pb.MEDIA_KIND_IMAGE, url=url)
        assert "--allow-media-path" in refused(served, item)


def test_the_client_imports_nothing_heavy() -> None:
    code = (
        "import sys, octavo; octavo.Client; octavo.ServerFile; "
        "print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_limit_is_a_setting_and_a_flag() -> None:
    done = CliRunner().invoke(app, ["serve", "--help"], terminal_width=300)
    for name in MediaLimits.__dataclass_fields__:
        default = getattr(MediaLimits, name)
        found = re.search(rf"--{name.replace('_', '-')} .*\[default: (\d+)\]", done.output)
        assert found and int(found[1]) == default, name
