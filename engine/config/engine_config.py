"""Engine settings. For those of the checkpoint, see `model_config` and `preprocess_config`."""

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


CHOICES = {  # valid values of a setting, and their description in errors
    "quantization": ((None, "int8"), "int8 or None"),
    "kv_cache_dtype": (("auto", "fp8"), "auto or fp8"),
    "overlap_steps": ((True, False), "true or false"),
    "isolate_media": ((True, False), "true or false"),
}


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine, with the same names as in vLLM if they exist there."""

    model: Path = EMBEDDED_MODEL
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    dtype: str = "auto"  # "auto" | "float32" | "bfloat16" | "float16"
    quantization: str | None = None  # "int8": weights on loading, and activations; CPU only
    kv_cache_dtype: str = "auto"  # "auto": same as `dtype`; "fp8": e4m3, scale per token; GPU only
    tensor_parallel_size: int = 1  # ranks; with `workers`, their number
    workers: tuple[str, ...] = ()  # HOST:PORT of each rank's `octavo worker`; (): local processes
    worker_tls: Path | None = None  # folder with tls.crt, tls.key and ca.crt for mutual TLS
    max_model_len: int | None = None  # prompt and output tokens; None: the model's positions
    max_num_seqs: int = 64  # maximum number of running requests
    max_num_batched_tokens: int = 2048  # tokens per step
    max_num_partial_prefills: int = 4  # chunked prompts per step
    # Token budget per step of all prompt chunks while other requests decode; None: depends on the
    # device.
    long_prefill_token_threshold: int | None = None
    max_restarts: int = 3  # worker restarts per 10 minutes
    overlap_steps: bool = True  # plan and send the next step while one runs
    max_queue_len: int = 1024  # waiting requests
    max_queue_tokens: int = 1 << 20  # tokens of waiting requests
    max_queue_bytes: int = 4 << 30  # images, videos and long texts as received, of all requests
    block_size: int = 16  # tokens per KV cache block
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None  # bytes per rank; None: from measured free memory
    max_encode_tokens: int = 16384  # image and video tokens encoded per step
    encoder_cache_tokens: int = 32768  # image and video tokens in the encoder cache
    max_unit_temporal_patches: int = 4  # temporal patches per unit of a video
    min_pixels: int | None = None  # of images; None: the checkpoint's
    max_pixels: int | None = None
    allowed_media_domains: tuple[str, ...] = ()  # domains that may be fetched from; "*": all
    # Folders of files that requests may name; None: all files readable by this process.
    allowed_media_paths: tuple[str | Path, ...] | None = None
    # Defaults for images and videos: fields of `MediaOptions` by name.
    image_options: Mapping[str, float] = field(default_factory=dict, hash=False)
    video_options: Mapping[str, float] = field(default_factory=dict, hash=False)
    max_media_bytes: int = MediaLimits.max_media_bytes  # this and the following: see `MediaLimits`
    max_media_pixels: int = MediaLimits.max_media_pixels
    max_video_frames: int = MediaLimits.max_video_frames
    max_video_seconds: int = MediaLimits.max_video_seconds
    max_media_items: int = MediaLimits.max_media_items
    fetch_timeout_s: int = MediaLimits.fetch_timeout_s
    media_timeout_s: int = MediaLimits.media_timeout_s
    decoder_memory_bytes: int = MediaLimits.decoder_memory_bytes
    isolate_media: bool = False  # decode files in separate processes, for untrusted clients
    # Names that requests may use, the first of which is in responses; (): hub id or folder name.
    served_model_name: str | tuple[str, ...] = ()
    trace_file: Path | None = None  # record of each step, for `octavo trace draw`

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if "int" not in str(each.type) or (value is None and "None" in str(each.type)):
                continue
            least = 0 if each.name == "max_restarts" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                text = f"must be an integer >= {least}"
                raise ConfigError(f"{each.name}={truncated_repr(value)}: {text}")
        for name, (choices, text) in CHOICES.items():
            value = getattr(self, name)
            if (type(value), value) not in [(type(each), each) for each in choices]:  # 1 == True
                raise ConfigError(f"{name}={truncated_repr(value)}: must be {text}")
        self._count_workers()
        self._read_served_names()
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            text = "must be a number > 0 and <= 1"
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
                "workers; remove tensor_parallel_size"
            )
        if self.worker_tls is not None and not workers:
            raise ConfigError(f"worker_tls={self.worker_tls}: requires workers; set workers")
        if workers:
            object.__setattr__(self, "tensor_parallel_size", len(workers))


def check_trace_file(path: Path | None) -> None:
    """Raise `ConfigError` if the trace file cannot be written."""
    try:
        if path is not None:
            Path(path).open("a").close()
    except OSError as error:
        raise ConfigError(f"trace_file={path}: {error.strerror}") from None
