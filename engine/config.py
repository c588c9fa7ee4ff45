"""Frozen settings: the checkpoint's shape, its preprocessing, and how the engine is to run.

Source: `config.json` of a Hugging Face Qwen2-VL folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..scheduler.params import shown
from .config_error import ConfigError
from .config_fields import Fields
from .json_files import read_json
from .media.limits import MediaLimits
from .preprocess_config import PreprocessConfig
from .weight_format import WeightFormat, read_weight_format

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

# Far more than any checkpoint has: what a configuration may ask for before its weights are looked
# at.
MAX_WIDTH, MAX_HEADS, MAX_HEAD_DIM, MAX_LAYERS = 1 << 20, 1 << 12, 1 << 12, 1 << 10
MAX_VOCAB, MAX_POSITIONS = 1 << 24, 1 << 24
VISION_TOKENS = {  # field: Qwen2-VL's token
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}

EMBEDDED_MODEL = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower."""

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    hidden_size: int  # of the decoder, which the merger writes

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def resize_factor(self) -> int:
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Qwen2-VL checkpoint. `dtype` is the checkpoint's, as a torch name."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool
    dtype: str
    vision_start_token_id: int
    vision_end_token_id: int
    vision_token_id: int  # <|vision_pad|>
    image_token_id: int
    video_token_id: int
    vision: VisionConfig
    weight_format: WeightFormat | None = None  # of a quantised checkpoint's decoder

    def stored(self, layer: int, name: str) -> WeightFormat | None:
        """How the linear layer `name` of a decoder layer is stored; None: dense."""
        return self.weight_format and self.weight_format.of(layer, name)

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Tokens that are never sampled and never come from plain text."""
        return (
            self.vision_start_token_id,
            self.vision_end_token_id,
            self.vision_token_id,
            self.image_token_id,
            self.video_token_id,
        )

    @classmethod
    def from_dir(cls, path: Path) -> ModelConfig:
        return cls.from_dict(read_json(path / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read both formats: text fields at the top, or nested under `text_config`. Raises
        `ConfigError`."""
        config = cls._read(raw)
        config._check()
        return config

    def _check(self) -> None:
        """Raises `ConfigError` for a shape that is not one."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(f"num_key_value_heads={kv_heads}: must divide {heads} heads")
        vision = self.vision
        if vision.embed_dim % (4 * vision.num_heads):
            raise ConfigError(
                f"config.json: vision_config: embed_dim={vision.embed_dim}: must be a multiple of "
                f"4 * num_heads ({4 * vision.num_heads})"
            )
        if vision.hidden_size != self.hidden_size:
            raise ConfigError(
                f"config.json: vision_config: hidden_size={vision.hidden_size}: must be the "
                f"decoder's, {self.hidden_size}"
            )
        inputs = (self.hidden_size, heads * self.head_dim, self.intermediate_size)
        if self.weight_format and self.weight_format.group_size:
            group, outputs = self.weight_format.group_size, (self.head_dim, self.intermediate_size)
            if any(size % group for size in inputs) or any(size % 8 for size in outputs):
                raise ConfigError(
                    f"group_size={group}: must divide the inputs of every layer, {inputs}; and 8 "
                    f"its outputs, head_dim and intermediate_size {outputs}"
                )
        for token in self.vision_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"token id {token}: outside the vocabulary of {self.vocab_size}")

    @classmethod
    def _read(cls, raw: dict[str, Any]) -> ModelConfig:
        if raw.get("model_type") != "qwen2_vl":
            raise ConfigError(
                f"config.json: model_type={shown(raw.get('model_type'))}: only 'qwen2_vl' is served"
            )
        top = Fields(raw, "config.json")
        text = Fields({**raw, **top.section("text_config").raw}, "config.json")
        rope = text.section(
            "rope_parameters" if text.raw.get("rope_parameters") else "rope_scaling"
        )
        hidden_size = text.integer("hidden_size", 1, MAX_WIDTH)
        heads = text.integer("num_attention_heads", 1, MAX_HEADS)
        layers = text.integer("num_hidden_layers", 1, MAX_LAYERS)
        head_dim = text.integer("head_dim", 1, MAX_HEAD_DIM, max(1, hidden_size // heads))
        _check_rope(text, rope)
        theta = rope if rope.raw.get("rope_theta") is not None else text
        stored = text.section(
            "quantization_config" if text.raw.get("quantization_config") else "compression_config"
        )
        tied = top if raw.get("tie_word_embeddings") is not None else text
        dtypes = (top.text("dtype"), top.text("torch_dtype"), text.text("dtype"))
        tokens = {
            name: text.integer(name, 0, MAX_VOCAB - 1, token)
            for name, token in VISION_TOKENS.items()
        }
        return cls(
            hidden_size=hidden_size,
            intermediate_size=text.integer("intermediate_size", 1, MAX_WIDTH),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=text.integer("num_key_value_heads", 1, MAX_HEADS, heads),
            head_dim=head_dim,
            vocab_size=text.integer("vocab_size", 1, MAX_VOCAB),
            max_position_embeddings=text.integer(
                "max_position_embeddings", 1, MAX_POSITIONS, 32768
            ),
            rms_norm_eps=text.number("rms_norm_eps", 0, 1, 1e-6),
            rope_theta=theta.number("rope_theta", 0, 1e15, 1_000_000.0),
            mrope_section=_mrope_section(rope, head_dim),
            tie_word_embeddings=tied.boolean("tie_word_embeddings", False),
            dtype=next(filter(None, dtypes), "float32"),
            vision=_vision_config(top, hidden_size),
            weight_format=read_weight_format({**stored.raw}, layers),
            **tokens,
        )


def _check_rope(text: Fields, rope: Fields) -> None:
    """Raises `ConfigError` for attention or positions that are not served."""
    if text.boolean("use_sliding_window", False):
        raise ConfigError("use_sliding_window=true: only full attention is served")
    kind = rope.text("rope_type") or rope.text("type") or "default"
    if kind not in ("default", "mrope"):
        raise ConfigError(f"rope type {shown(kind)}: only plain M-RoPE is served")


def _mrope_section(rope: Fields, head_dim: int) -> tuple[int, int, int]:
    section: Any = rope.raw.get("mrope_section")
    are_sizes = isinstance(section, list) and all(
        type(each) is int and each >= 0 for each in section
    )
    if not are_sizes or len(section) != 3 or sum(section) * 2 != head_dim:
        raise ConfigError(
            f"mrope_section={shown(section)}: must be three numbers whose sum is half of "
            f"head_dim={head_dim}"
        )
    return section[0], section[1], section[2]


def _vision_config(top: Fields, hidden_size: int) -> VisionConfig:
    vision = top.section("vision_config")
    if not vision.raw:
        raise ConfigError("config.json: has no vision_config")
    channels = "in_channels" if vision.raw.get("in_channels") is not None else "in_chans"
    return VisionConfig(
        depth=vision.integer("depth", 1, MAX_LAYERS),
        embed_dim=vision.integer("embed_dim", 1, MAX_WIDTH),
        num_heads=vision.integer("num_heads", 1, MAX_HEADS),
        mlp_ratio=vision.number("mlp_ratio", 0, 64, 4),
        in_channels=vision.integer(channels, 1, 16, 3),
        patch_size=vision.integer("patch_size", 1, 256, 14),
        spatial_merge_size=vision.integer("spatial_merge_size", 1, 16, 2),
        temporal_patch_size=vision.integer("temporal_patch_size", 1, 16, 2),
        hidden_size=vision.integer("hidden_size", 1, MAX_WIDTH, hidden_size),
    )


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
    trace_file: Path | None = None  # record each step there, for `octavo trace draw`

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if "int" not in str(each.type) or (value is None and "None" in str(each.type)):
                continue
            least = 0 if each.name == "max_restarts" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                text = f"must be a whole number from {least} on"
                raise ConfigError(f"{each.name}={shown(value)}: {text}")
        for name, (choices, text) in CHOICES.items():
            value = getattr(self, name)
            if (type(value), value) not in [(type(each), each) for each in choices]:  # 1, True
                raise ConfigError(f"{name}={shown(value)}: must be {text}")
        self._count_workers()
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            text = "must be a number over 0 and at most 1"
            raise ConfigError(f"gpu_memory_utilization={shown(share)}: {text}")

    def _count_workers(self) -> None:
        workers = self.workers
        if isinstance(workers, str) or not all(isinstance(each, str) for each in workers):
            raise ConfigError(f"workers={shown(workers)}: must be a list of HOST:PORT, by rank")
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
