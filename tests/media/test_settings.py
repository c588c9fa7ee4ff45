"""What the engine is told of images and videos: defaults of items, contradictions, positions."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import octavo
from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Server, start
from octavo.benchmarks.media.cases import encoded, mp4, noise
from octavo.engine.cli import serve as cli_serve
from octavo.engine.cli.main import app
from octavo.engine.cli.media_options import hosts_of
from octavo.engine.client.client import ClientError
from octavo.engine.config.engine_config import EngineConfig, ModelConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import ConfigError, InputError
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.settings import media_settings

PARAMS = octavo.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 16 << 20,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("own", "server", "merged"),
    [
        ({}, {"fps": 1, "max_pixels": 9}, {"fps": 1, "max_pixels": 9}),
        ({"fps": 2}, {"fps": 1, "max_pixels": 9}, {"fps": 2, "max_pixels": 9}),
        ({"nframes": 8}, {"fps": 1}, {"nframes": 8}),
        ({"nframes": 8}, {"min_frames": 10}, {"nframes": 8}),
        ({"nframes": 8}, {"max_frames": 4, "max_pixels": 9}, {"nframes": 8, "max_pixels": 9}),
        ({"fps": 1}, {"nframes": 8}, {"fps": 1}),
        ({"max_frames": 4}, {"nframes": 8}, {"max_frames": 4}),
        ({"min_frames": 4}, {"nframes": 8}, {"min_frames": 4}),
        ({"max_frames": 4}, {"fps": 2}, {"max_frames": 4, "fps": 2}),
        ({"max_frames": 4}, {"min_frames": 6}, {"max_frames": 4}),
        ({"min_frames": 6}, {"max_frames": 4}, {"min_frames": 6}),
        ({"min_frames": 4}, {"max_frames": 6}, {"min_frames": 4, "max_frames": 6}),
        ({"max_pixels": 4}, {"min_pixels": 6}, {"max_pixels": 4}),
        ({"min_pixels": 6}, {"max_pixels": 4}, {"min_pixels": 6}),
        ({"min_pixels": 4}, {"max_pixels": 6}, {"min_pixels": 4, "max_pixels": 6}),
        ({"max_pixels": 4}, {"total_pixels": 60}, {"max_pixels": 4, "total_pixels": 60}),
        ({"max_pixels": 4}, {"resized_height": 2, "resized_width": 3}, {"max_pixels": 4}),
        ({"total_pixels": 4}, {"resized_height": 2, "resized_width": 3}, {"total_pixels": 4}),
        (
            {"resized_height": 2, "resized_width": 3},
            {"min_pixels": 7, "max_pixels": 9, "total_pixels": 8},
            {"resized_height": 2, "resized_width": 3},
        ),
        (
            {"resized_height": 2, "resized_width": 3},
            {"resized_height": 5, "resized_width": 5},
            {"resized_height": 2, "resized_width": 3},
        ),
        ({"video_start": 5}, {"video_end": 4}, {"video_start": 5}),
        ({"video_end": 4}, {"video_start": 5}, {"video_end": 4}),
        (
            {"video_end": 4},
            {"video_start": 0, "fps": 1},
            {"video_end": 4, "video_start": 0, "fps": 1},
        ),
    ],
)
def test_an_item_s_options_go_before_the_server_s(
    own: dict[str, Any], server: dict[str, Any], merged: dict[str, Any]
) -> None:
    """Of two that contradict each other the server's yields; what is left contradicts nothing."""
    found = MediaOptions(**own).over(MediaOptions(**server))
    assert found.given == merged
    assert MediaOptions.from_part(found.given, "video", "video") == found


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[octavo.LLM]:
    image, video = {"max_pixels": 3136}, {"nframes": 4, "max_pixels": 3136}
    with octavo.LLM(checkpoint, image_options=image, video_options=video, **SETTINGS) as llm:
        yield llm


def used(llm: octavo.LLM, kind: str, source: Any, **options: Any) -> Any:
    part = {"type": kind, kind: source, **options}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    return llm.chat(messages, PARAMS)[0].media[0]


def test_a_server_s_options(llm: octavo.LLM) -> None:
    picture = noise(84, 84)
    assert used(llm, "image", picture).height == 56
    assert used(llm, "image", picture, max_pixels=12544).height == 84
    assert used(llm, "image", picture, min_pixels=12544).height == 112  # the server's is under it
    assert used(llm, "image", picture, resized_height=56, resized_width=84).width == 84
    clip = mp4(20)
    assert used(llm, "video", clip).num_frames == 4
    assert used(llm, "video", clip, fps=5).num_frames == 10
    assert used(llm, "video", clip, nframes=6).num_frames == 6
    assert used(llm, "video", clip).height * used(llm, "video", clip).width <= 3136
    frames = [picture] * 6  # nframes is of files
    for source in (frames, np.stack([np.asarray(each) for each in frames])):
        info = used(llm, "video", source)
        assert (info.num_frames, info.sample_fps, info.height) == (6, 2.0, 56)
    values = np.zeros((6, 64), np.float32)
    assert used(llm, "image", octavo.MediaEmbeds(values, (1, 4, 6))).num_tokens == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_pixels": 10}, "max_pixels=10: must be at least 784"),
        ({"image_options": {"max_pixels": 700}}, "image_options.max_pixels=700: must be at least"),
        ({"video_options": {"total_pixels": 700}}, "video_options.total_pixels=700"),
        (
            {"min_pixels": 9000, "max_pixels": 8000},
            "min_pixels: 9000 is greater than max_pixels=8000",
        ),
        ({"max_pixels": 8000, "image_options": {"max_pixels": 8000}}, "set it only once"),
        ({"max_pixels": 8000, "image_options": {"min_pixels": 9000}}, "--image-option"),
        (
            {"max_pixels": 8000, "image_options": {"resized_height": 280, "resized_width": 280}},
            "resized_height",
        ),
        ({"image_options": {"fps": 1}}, "'fps' is not an option; the options of images are"),
        ({"image_options": {"image": "x"}}, "'image' is not an option"),
        ({"image_options": [("fps", 1)]}, "image_options: must be a dict"),
        (
            {"video_options": {"fps": 1, "nframes": 2}},
            "video_options.fps: cannot be combined with nframes",
        ),
        ({"video_options": {"fps": "fast"}}, "(--video-option)"),
        ({"video_options": {"min_frames": 9, "max_frames": 8}}, "min_frames"),
        ({"max_video_frames": 0}, "max_video_frames=0"),
        ({"media_timeout_s": -1}, "media_timeout_s=-1"),
        ({"max_media_bytes": 1.5}, "max_media_bytes=1.5"),
        ({"allowed_media_paths": ["/no/such"]}, "--allow-media-path '/no/such'"),
        ({"allowed_media_domains": ["http://a.b/"]}, "--allow-media-domains"),
        ({"allowed_media_domains": "a b"}, "--allow-media-domains 'a b'"),
        ({"allow_local_files": True}, "allow_local_files: unknown"),
    ],
)
def test_settings_that_contradict_are_rejected_before_anything_is_loaded(
    checkpoint: Path, settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.engine.core.engine.WorkerGroup", None)
    with pytest.raises(ConfigError) as error:
        octavo.LLM(checkpoint, **settings)
    assert words in str(error.value)


def test_settings_as_the_media_s_rooms_have_them(checkpoint: Path, tmp_path: Path) -> None:
    model = ModelConfig.from_dir(checkpoint)
    whole = media_settings(EngineConfig(model=checkpoint), model)
    assert whole.limits == MediaLimits()
    assert (whole.access.roots, whole.access.domains) == (None, ())
    config = EngineConfig(
        model=checkpoint,
        allowed_media_paths=str(tmp_path),  # type: ignore[arg-type]
        allowed_media_domains="*",  # type: ignore[arg-type]
        max_media_items=3,
        max_pixels=7840,
    )
    assert hash(config) == hash(config)
    found = media_settings(config, model)
    assert (found.access.roots, found.access.domains) == ((tmp_path.resolve(),), ("*",))
    assert found.limits == MediaLimits(max_media_items=3)
    assert found.preprocess.max_pixels == 7840
    nothing = media_settings(EngineConfig(model=checkpoint, allowed_media_paths=()), model)
    assert nothing.access.roots == ()


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("media")
    noise(84, 84).save(folder / "a.png")
    options = ["--image-option", "max_pixels=3136", "--video-option", "nframes=4"]
    options += ["--max-media-items", "2", "--max-media-pixels", "10000"]
    server = start(checkpoint, *options, "--allow-media-path", str(folder))
    server.folder = folder  # type: ignore[attr-defined]
    yield server
    assert server.end() == 0


def test_the_flags_of_a_server(server: Any) -> None:
    def ask(*parts: dict[str, Any]) -> Any:
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
        return next(client.chat(messages, max_tokens=1)).media[0]

    with octavo.Client(server.address) as client:
        picture = {"type": "image", "image": octavo.ServerFile(f"{server.folder}/a.png")}
        assert ask(picture).height == 56
        assert ask({**picture, "max_pixels": 12544}).height == 84
        assert ask({"type": "video", "video": mp4(20)}).num_frames == 4
        large = {"type": "image", "image": encoded(Image.new("RGB", (101, 100)))}
        url = {"type": "image", "image": "https://example.com/a.png"}
        outside = {"type": "image", "image": octavo.ServerFile("/etc/passwd")}
        for parts, flag in (
            ([picture] * 3, "--max-media-items"),
            ([large], "--max-media-pixels"),
            ([url], "--allow-media-domains"),
            ([outside], "--allow-media-path"),
        ):
            with pytest.raises(ClientError, match=flag) as error:
                ask(*parts)
            assert error.value.code == "INVALID_ARGUMENT"


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In this process, whose signals and logs it leaves alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_serve, "set_up_logs", lambda form: None)
        patch.setattr(cli_serve.signal, "signal", lambda number, handler: None)
        done = CliRunner().invoke(app, arguments)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def test_a_port_in_use_is_found_before_a_model_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serve("serve", "--port", port, "--model", "/no/such")
        metrics = serve("serve", "--port", "0", "--metrics-port", port, "--model", "/no/such")
        http = serve("serve", "--port", "0", "--http-port", port, "--model", "/no/such")
    assert done.returncode == 2 and f"--port {port}" in done.stderr and "in use" in done.stderr
    assert f"octavo: --metrics-port {port}" in metrics.stderr and "in use" in metrics.stderr
    assert f"octavo: --http-port {port}" in http.stderr and "in use" in http.stderr


def test_a_host_for_http_alone_is_reported() -> None:
    done = serve("serve", "--http-host", "127.0.0.1", "--model", "/no/such")
    assert done.returncode == 2 and "requires --http-port" in done.stderr


def test_a_limit_is_reported_as_flag_and_as_setting() -> None:
    with pytest.raises(InputError, match="--max-media-bytes of octavo serve") as refused:
        MediaLimits(max_media_bytes=5).check_bytes(6, "messages[0].content[0].image")
    assert "max_media_bytes= of LLM" in str(refused.value)


def test_who_types_a_url_wants_it_fetched() -> None:
    typed = ["/a/http://b", "HTTP://A.org/x", "https://a.org", "data:x", "http:///", "https://b:8/"]
    assert hosts_of(typed) == ("a.org", "b")


def test_version() -> None:
    done = serve("--version")
    assert (done.returncode, done.stdout) == (0, f"octavo {octavo.__version__}\n")


def test_max_model_len_may_be_over_the_positions(tmp_path: Path) -> None:
    """A video's tokens share positions: 640 of them are 40 positions of 256."""
    folder = write_tiny_checkpoint(tmp_path, max_position_embeddings=256)
    size = {"resized_height": 112, "resized_width": 112}
    frames = [noise(112, 112, seed) for seed in range(80)]
    params = octavo.SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    with octavo.LLM(folder, **{**SETTINGS, "max_model_len": 1024}) as llm:
        part = {"type": "video", "video": frames, **size}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        out = llm.chat(messages, params)[0]
        assert out.media[0].num_tokens == 640 > 2 * 256
        assert len(out.prompt_token_ids) > 640
        # The answer ends where the positions do.
        text = len(out.prompt_token_ids) - 640
        assert len(out.outputs[0].token_ids) == 256 - 40 - text
        assert out.outputs[0].finish_reason == "length"
        with pytest.raises(ValueError, match="256 positions"):
            llm.generate("x" * 300, params)
    settings = {**SETTINGS, "max_model_len": None}  # as many as there are positions
    with (
        octavo.LLM(folder, **settings) as llm,
        pytest.raises(ValueError, match="max_model_len=256"),
    ):
        llm.chat(messages, params)
