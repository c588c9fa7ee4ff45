"""Architecture of a checkpoint's model.

Source: `config.json` of a Hugging Face Qwen2-VL folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .json_fields import JsonFields
from .json_files import read_json
from .quantization import WeightFormat, read_weight_format

FILE = "config.json"
# Far above all existing models; larger numbers would take unlimited time and memory.
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_WIDTH = 1 << 18  # of hidden layers
MAX_VOCAB = 1 << 22
MAX_POSITIONS = 1 << 28
MAX_PATCH = 256  # pixels of a patch's side, patches of a merged side, frames


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
    hidden_size: int  # of the decoder; output size of the merger

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
    """Shape of a Qwen2-VL checkpoint. `dtype` is the torch name of the checkpoint's dtype."""

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
    weight_format: WeightFormat | None = None  # of a quantized decoder; None: dense

    def stored(self, layer: int, name: str) -> WeightFormat | None:
        """Return the format of linear layer `name` of a decoder layer; None: dense."""
        return self.weight_format and self.weight_format.of(layer, name)

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Token ids that are never sampled and never encoded from plain text."""
        return (
            self.vision_start_token_id,
            self.vision_end_token_id,
            self.vision_token_id,
            self.image_token_id,
            self.video_token_id,
        )

    @classmethod
    def from_dir(cls, path: Path) -> ModelConfig:
        """Read a checkpoint's `config.json`. Raises `ConfigError`."""
        return cls.from_dict(read_json(path / FILE))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read a config with the text fields at the top level (older) or under `text_config`.

        Raises `ConfigError` naming the field, its value and the valid values.
        """
        if raw.get("model_type") != "qwen2_vl":
            raise JsonFields(raw, FILE).error("model_type", "must be 'qwen2_vl'")
        nested = JsonFields(raw, FILE).nested("text_config")
        text = JsonFields({**raw, **nested.raw}, FILE, nested.prefix if nested.raw else "")
        config = cls._read(raw, text)
        config._check()
        return config

    @classmethod
    def _read(cls, raw: dict[str, Any], text: JsonFields) -> ModelConfig:
        heads = text.integer("num_attention_heads", 1, MAX_HEADS)
        hidden_size = text.integer("hidden_size", 1, MAX_WIDTH)
        head_dim = text.integer("head_dim", 1, MAX_HEAD_DIM, hidden_size // heads)
        layers = text.integer("num_hidden_layers", 1, MAX_LAYERS)
        vocab_size = text.integer("vocab_size", 1, MAX_VOCAB)
        rope_theta, section = _rope(text, head_dim)
        top = JsonFields({**text.raw, **{n: v for n, v in raw.items() if v is not None}}, FILE)
        if text.get("use_sliding_window"):
            valid = "must be false: only full attention is supported"
            raise text.error("use_sliding_window", valid)
        stored = text.get("quantization_config") or text.get("compression_config")

        def token(fields: JsonFields, name: str, default: int) -> int:
            found = fields.integer(name, 0, MAX_VOCAB, default)
            if found >= vocab_size:
                raise ConfigError(f"{FILE}: {name}={found} must be below vocab_size={vocab_size}")
            return found

        return cls(
            hidden_size=hidden_size,
            intermediate_size=text.integer("intermediate_size", 1, MAX_WIDTH),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=text.integer("num_key_value_heads", 1, heads, heads),
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_position_embeddings=text.integer(
                "max_position_embeddings", 1, MAX_POSITIONS, 32768
            ),
            rms_norm_eps=text.number("rms_norm_eps", 0, 1, 1e-6),
            rope_theta=rope_theta,
            mrope_section=section,
            tie_word_embeddings=bool(top.get("tie_word_embeddings")),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "float32"),
            vision_start_token_id=token(text, "vision_start_token_id", 151652),
            vision_end_token_id=token(text, "vision_end_token_id", 151653),
            vision_token_id=token(text, "vision_token_id", 151654),
            image_token_id=token(top, "image_token_id", 151655),
            video_token_id=token(top, "video_token_id", 151656),
            vision=_vision_config(JsonFields(raw, FILE).nested("vision_config"), hidden_size),
            weight_format=read_weight_format(stored, layers),
        )

    def _check(self) -> None:
        """Raise `ConfigError` if fields contradict each other."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(
                f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}"
            )
        inputs = (self.hidden_size, heads * self.head_dim, self.intermediate_size)
        if self.weight_format and self.weight_format.group_size:
            group, outputs = self.weight_format.group_size, (self.head_dim, self.intermediate_size)
            if any(size % group for size in inputs) or any(size % 8 for size in outputs):
                raise ConfigError(
                    f"group_size={group}: must divide the input sizes of every layer, {inputs}; "
                    f"head_dim and intermediate_size, {outputs}, must be multiples of 8"
                )


def _rope(text: JsonFields, head_dim: int) -> tuple[float, tuple[int, int, int]]:
    """Return the base of the rotary frequencies, and their numbers for t, h and w."""
    found = (text.get("rope_parameters") and "rope_parameters") or "rope_scaling"
    rope = text.nested(found)
    name = "rope_type" if rope.get("rope_type") else "type"
    if (rope.get(name) or "default") not in ("default", "mrope"):
        raise rope.error(name, "must be 'default' or 'mrope': RoPE scaling is not supported")
    section = rope.numbers("mrope_section", 3, 0, MAX_HEAD_DIM)
    if not section or sum(section) * 2 != head_dim or not all(type(n) is int for n in section):
        valid = f"must be three integers whose sum is half of head_dim={head_dim}"
        raise rope.error("mrope_section", valid)
    default = text.number("rope_theta", 1, 1e12, 1_000_000.0)
    t, h, w = map(int, section)
    return rope.number("rope_theta", 1, 1e12, default), (t, h, w)


def _vision_config(raw: JsonFields, hidden_size: int) -> VisionConfig:
    channels = "in_channels" if raw.get("in_channels") is not None else "in_chans"
    found = VisionConfig(
        depth=raw.integer("depth", 1, MAX_LAYERS),
        embed_dim=raw.integer("embed_dim", 1, MAX_WIDTH),
        num_heads=raw.integer("num_heads", 1, MAX_HEADS),
        mlp_ratio=raw.number("mlp_ratio", 0.01, 100, 4),
        in_channels=raw.integer(channels, 3, 3, 3),
        patch_size=raw.integer("patch_size", 1, MAX_PATCH, 14),
        spatial_merge_size=raw.integer("spatial_merge_size", 1, MAX_PATCH, 2),
        temporal_patch_size=raw.integer("temporal_patch_size", 1, MAX_PATCH, 2),
        hidden_size=raw.integer("hidden_size", 1, MAX_WIDTH, hidden_size),
    )
    if found.embed_dim % (4 * found.num_heads):  # 2D RoPE rotates pairs, for rows and columns
        raise raw.error("embed_dim", f"must be a multiple of 4 * num_heads={found.num_heads}")
    return found
