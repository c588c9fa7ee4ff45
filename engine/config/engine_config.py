"""Settings of an engine. The checkpoint's own are in `model_config` and `preprocess_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from ...scheduler.params import truncated_repr
from ..errors import ConfigError
from .json_files import read_json
from .media_limits import MediaLimits
from .model_config import ModelConfig, VisionConfig
from .preprocess_config import PreprocessConfig

__all__ = [
    "EMBEDDED_MODEL",
    "ConfigError",
    "EngineConfig",
    "ModelConfig",
    "PreprocessConfig",
    "VisionConfig",
    "check_trace_file",
    "read_json",
]

EMBEDDED_MODEL = Path(__file__).parent.parent / "embedded"


CHOICES = {  # of a setting, and how they are told
    "quantization": ((None, "int8"), "int8, or left out"),
    "kv_cache_dtype": (("auto", "fp8"), "auto or fp8"),
    "overlap_steps": ((True, False), "true or false"),
    "isolate_media": ((True, False), "true or false"),
}


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is to run. Names are vLLM's where it has one."""

    model: Path = EMBEDDED_MODEL
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    dtype: str = "auto"  # "auto" | "float32" | "bfloat16" | "float16"
    quantization: str | None = None  # "int8": of weights on loading and of activations, on a CPU
    kv_cache_dtype: str = "auto"  # "auto": as `dtype`; "fp8": e4m3 with a scale a token, on a GPU
    tensor_parallel_size: int = 1  # with `workers`: as many as those
    workers: tuple[str, ...] = ()  # HOST:PORT of each rank's `octavo worker`; (): processes here
    worker_tls: Path | None = None  # folder of tls.crt, tls.key, ca.crt: mutual TLS with `workers`
    max_model_len: int | None = None  # tokens of prompt and output; None: what positions allow
    max_num_seqs: int = 64  # requests that run at once
    max_num_batched_tokens: int = 2048  # tokens of one step
    max_num_partial_prefills: int = 4  # prompts that go in pieces in one step
    long_prefill_token_threshold: int | None = None  # tokens of all pieces in a step while others
    # decode; None: by the device
    max_restarts: int = 3  # times in ten minutes that workers which ended are started anew
    overlap_steps: bool = True  # plan and send a step while the one before it runs
    max_queue_len: int = 1024  # requests that wait for a place
    max_queue_tokens: int = 1 << 20  # their tokens
    max_queue_bytes: int = 4 << 30  # of images and videos as they came, of all requests
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None  # bytes a rank; None: measured
    max_encode_tokens: int = 16384  # image tokens encoded in one step
    encoder_cache_tokens: int = 32768  # image tokens whose embeddings are kept
    max_unit_temporal_patches: int = 4  # a video is encoded in units of this many
    min_pixels: int | None = None  # for images; None: the checkpoint's
    max_pixels: int | None = None
    allowed_media_domains: tuple[str, ...] = ()  # of URLs that are fetched; "*": all
    allowed_media_paths: tuple[str | Path, ...] | None = None  # folders of files that callers may
    # name; None: all files, as whoever runs the engine may read them
    # What an item gets whose caller says nothing of it: fields of `MediaOptions` by name.
    image_options: Mapping[str, float] = field(default_factory=dict, hash=False)
    video_options: Mapping[str, float] = field(default_factory=dict, hash=False)
    max_media_bytes: int = MediaLimits.max_media_bytes  # this and the next: see `MediaLimits`
    max_media_pixels: int = MediaLimits.max_media_pixels
    max_video_frames: int = MediaLimits.max_video_frames
    max_video_seconds: int = MediaLimits.max_video_seconds
    max_media_items: int = MediaLimits.max_media_items
    fetch_timeout_s: int = MediaLimits.fetch_timeout_s
    media_timeout_s: int = MediaLimits.media_timeout_s
    decoder_memory_bytes: int = MediaLimits.decoder_memory_bytes
    isolate_media: bool = False  # decode files in processes of their own: for callers from outside
    served_model_name: str | tuple[str, ...] = ()  # names that requests may use; the first is in
    # responses; (): the hub id or the folder's name
    trace_file: Path | None = None  # record each step there, for `octavo trace draw`

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if "int" not in str(each.type) or (value is None and "None" in str(each.type)):
                continue
            least = 0 if each.name == "max_restarts" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                text = f"must be a whole number from {least} on"
                raise ConfigError(f"{each.name}={truncated_repr(value)}: {text}")
        for name, (choices, text) in CHOICES.items():
            value = getattr(self, name)
            if (type(value), value) not in [(type(each), each) for each in choices]:  # 1, True
                raise ConfigError(f"{name}={truncated_repr(value)}: must be {text}")
        self._count_workers()
        self._read_served_names()
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            text = "must be a number over 0 and at most 1"
            raise ConfigError(f"gpu_memory_utilization={truncated_repr(share)}: {text}")

    def _read_served_names(self) -> None:
        names = self.served_model_name
        names = (names,) if isinstance(names, str) else names
        if not isinstance(names, list | tuple) or not all(
            isinstance(name, str) and name and name.isprintable() for name in names
        ):
            text = "must be a printable name or a list of them"
            raise ConfigError(f"served_model_name={truncated_repr(self.served_model_name)}: {text}")
        object.__setattr__(self, "served_model_name", tuple(dict.fromkeys(names)))

    def _count_workers(self) -> None:
        workers = self.workers
        if isinstance(workers, str) or not all(isinstance(each, str) for each in workers):
            raise ConfigError(
                f"workers={truncated_repr(workers)}: must be a list of HOST:PORT, by rank"
            )
        if workers and self.tensor_parallel_size not in (1, len(workers)):
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}: there are {len(workers)} "
                "workers; leave it out"
            )
        if self.worker_tls is not None and not workers:
            raise ConfigError(f"worker_tls={self.worker_tls}: there are no workers to talk it with")
        if workers:
            object.__setattr__(self, "tensor_parallel_size", len(workers))


def check_trace_file(path: Path | None) -> None:
    """Raises `ConfigError` when it cannot be written, before anything is loaded."""
    try:
        if path is not None:
            Path(path).open("a").close()
    except OSError as error:
        raise ConfigError(f"trace_file={path}: {error.strerror}") from None
