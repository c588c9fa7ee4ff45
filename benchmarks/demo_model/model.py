"""A compact Qwen2-VL for training on dense batches, with the checkpoint's tensors and names.

Each batch has conversations of one layout (same grids at the same positions), so attention needs no
padding or segments. Equivalent to transformers' `Qwen2VLForConditionalGeneration`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Classes of the training heads: color, shape, center or not, digit and left-to-right order for each
# half of a patch, direction of motion, row, column.
AUX_SIZES = (9, 7, 2, 22, 14, 5, 8, 8)


@dataclass(frozen=True)
class Shape:
    vocab: int = 512
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 384
    section: tuple[int, int, int] = (4, 6, 6)
    theta: float = 10000.0
    v_dim: int = 128
    v_layers: int = 6
    v_heads: int = 4


# Per item: the training heads' outputs from the tower and from the embeddings, and the similarity
# of the embeddings to words; see `TrainModel.look`.
Seen = tuple[torch.Tensor, torch.Tensor]


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Compute attention explicitly: for short sequences on a CPU, training is 2x faster."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        n = q.shape[-2]
        scores = scores + torch.full((n, n), -1e4, dtype=scores.dtype).triu(1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = x.float()
        return self.weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6))


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q = (q * cos + rotate_half(q) * sin).to(v.dtype)
        k = (k * cos + rotate_half(k) * sin).to(v.dtype)
        y = attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, d))


class VisionMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = VisionAttention(dim, heads)
        self.mlp = VisionMLP(dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(4 * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        return self.mlp(self.ln_q(x).view(b, n // 4, 4 * d))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (2, 14, 14), (2, 14, 14), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.proj.weight.flatten(1))


class Vision(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.head_dim = s.v_dim // s.v_heads
        self.patch_embed = PatchEmbed(s.v_dim)
        self.blocks = nn.ModuleList(VisionBlock(s.v_dim, s.v_heads) for _ in range(s.v_layers))
        self.merger = Merger(s.v_dim, s.hidden)

    def rotary(self, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [h*w, head_dim] in merge-group order."""
        inv = 1.0 / 10000 ** (torch.arange(0, self.head_dim // 2, 2) / (self.head_dim // 2))
        rows = torch.arange(h)[:, None].expand(h, w)
        cols = torch.arange(w)[None].expand(h, w)
        order = [x.reshape(h // 2, 2, w // 2, 2).transpose(1, 2).reshape(-1) for x in (rows, cols)]
        angles = torch.cat([p[:, None] * inv for p in order], dim=1)
        angles = torch.cat((angles, angles), dim=1)
        return angles.cos(), angles.sin()

    def forward(self, patches: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode patches [frames, h*w, 1176].

        Returns embeddings [frames, h*w/4, hidden] and patch features.
        """
        cos, sin = self.rotary(h, w)
        x = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger(x), x


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        s = self.s
        q = self.q_proj(x).view(b, n, s.heads, s.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2)
        q = (q * cos + rotate_half(q) * sin).to(v.dtype)
        k = (k * cos + rotate_half(k) * sin).to(v.dtype)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = attend(q, k, v, causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, -1))


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = MLP(s)
        self.input_layernorm = RMSNorm(s.hidden)
        self.post_attention_layernorm = RMSNorm(s.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden)


class TrainModel(nn.Module):
    """The model with auxiliary heads, dropped on export, that predict the contents of patches."""

    def __init__(self, s: Shape, words: list[int]) -> None:
        """Initialize the weights; `words` are the token ids of the color and shape words."""
        super().__init__()
        self.s = s
        self.words = torch.tensor(words)
        self.visual = Vision(s)
        self.model = Decoder(s)
        self.aux = nn.ModuleList(
            (
                nn.Linear(s.v_dim, sum(AUX_SIZES)),
                nn.Linear(s.hidden, 4 * sum(AUX_SIZES)),
                nn.Linear(s.hidden, 3),  # at a question's word: which images show it
            )
        )
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 if "embed" in name else 0.7 * p[0].numel() ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [n, head_dim] of positions [3, n]."""
        s = self.s
        inv = 1.0 / s.theta ** (torch.arange(0, s.head_dim, 2) / s.head_dim)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(s.section))
        angles = positions.float()[axis].T * inv
        angles = torch.cat((angles, angles), dim=1)
        return angles.cos(), angles.sin()

    def look(self, patches: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, Seen]:
        """Encode patches and apply the training heads.

        Returns embeddings [frames, h*w/4, hidden], head outputs [2, frames, h*w, classes] and
        similarities to words [frames, h*w/4, words].
        """
        embedded, feature = self.visual(patches, h, w)
        late = self.aux[1](embedded).view(*feature.shape[:2], -1)
        words = F.normalize(self.model.embed_tokens.weight[self.words], dim=-1)
        likeness = F.normalize(embedded, dim=-1) @ words.T.to(embedded.dtype)
        return embedded, (torch.stack((self.aux[0](feature), late)), likeness)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        media: list[tuple[torch.Tensor, int, int, int, torch.Tensor | None]],
    ) -> tuple[torch.Tensor, list[Seen]]:
        """Run the model on token_ids [b, n] with positions [3, n].

        `media` has, per item, (patches [p*t, h*w, 1176], h, w, offset, and the picture index of
        each of the b rows, or None). Returns hidden states [b, n, hidden] and `Seen` per item.
        """
        x = self.model.embed_tokens(token_ids)
        guesses = []
        for patches, h, w, offset, rows in media:
            embedded, guess = self.look(patches, h, w)
            guesses.append(guess)
            embedded = embedded[rows] if rows is not None else embedded
            embedded = embedded.reshape(len(x), -1, embedded.shape[-1]).to(x.dtype)
            x = torch.cat((x[:, :offset], embedded, x[:, offset + embedded.shape[1] :]), dim=1)
        cos, sin = self.rotary(positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x), guesses

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)
