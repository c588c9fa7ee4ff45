"""4-bit weights: the layouts of AWQ and GPTQ checkpoints, and that of our kernel.

In all of them weight[k, o] = (q[k, o] - zero[g, o]) × scale[g, o], with integers q and zero, and g
the group of input k. They differ in the position of the four bits of q.

AWQ (`version` "gemm"): int32 [in, out / 8]; bits [4 i, 4 i + 4) are column AWQ_ORDER[i] of eight.
GPTQ: int32 [in / 8, out]; bits [4 i, 4 i + 4) are row i of eight. Its zeros, int32
[groups, out / 8] in plain order, are stored minus one.
Sources: the packers of AutoAWQ (`WQLinear_GEMM`) and AutoGPTQ (`QuantLinear.pack`).

Kernel layout: blocks of 256 inputs, int32 [blocks, out, 32]. Word w of a row has inputs
64 j + 2 w and 64 j + 2 w + 1 of the block at bits 4 j and 4 j + 16, for j in 0 … 3. One shift and
one mask of a word extract two neighbors, one in each half of the word, which become 16-bit floats
without further moves. Rows are 128 bytes, read in 16-byte loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BLOCK, WORDS, CHUNK = 256, 32, 64  # inputs per block, words per row, inputs per shift
GROUPS = (64, 128)  # inputs per scale in the kernel layout


@dataclass(frozen=True)
class Int4Groups:
    """Unpacked 4-bit weights, one value per element."""

    numbers: torch.Tensor  # uint8 [in, out], 0 … 15
    zeros: torch.Tensor  # uint8 [groups, out], 0 … 16
    scales: torch.Tensor  # [groups, out]

    def dequantize(self) -> torch.Tensor:
        """Return the dense weight, float32 [out, in]."""
        group_size = self.numbers.shape[0] // self.scales.shape[0]
        zeros, scales = (
            x.float().repeat_interleave(group_size, 0) for x in (self.zeros, self.scales)
        )
        return ((self.numbers.float() - zeros) * scales).T.contiguous()


@dataclass(frozen=True)
class PackedInt4:
    """4-bit weights in the kernel layout. The last block is zero-padded."""

    words: torch.Tensor  # int32 [blocks, out, WORDS]
    scales: torch.Tensor  # float16 [blocks × groups per block, out], none is zero
    zeros: torch.Tensor  # uint8, like scales
    in_size: int

    @property
    def out_size(self) -> int:
        return self.words.shape[1]

    @property
    def group_size(self) -> int:
        return len(self.words) * BLOCK // len(self.scales)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.zeros.nbytes


def unpack_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Groups:
    """Unpack the tensors of a layer in an AWQ checkpoint.

    qweight: int32 [in, out / 8]. qzeros: int32 [groups, out / 8]. scales: [groups, out].
    """
    at = torch.tensor([AWQ_ORDER.index(column) for column in range(8)], device=qweight.device)
    numbers, zeros = (
        _nibbles(words)[..., at].flatten(1) for words in (qweight, qzeros)
    )  # [rows, out / 8, 8] -> [rows, out]
    return Int4Groups(numbers, zeros, scales)


def unpack_gptq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Groups:
    """Unpack the tensors of a layer in a GPTQ checkpoint.

    qweight: int32 [in / 8, out]. qzeros: int32 [groups, out / 8]. scales: [groups, out].
    Its `g_idx` must be in order (`in_order`).
    """
    numbers = _nibbles(qweight).transpose(1, 2).flatten(0, 1)  # [in / 8, out, 8] -> [in, out]
    return Int4Groups(numbers, _nibbles(qzeros).flatten(1) + 1, scales)


def in_order(g_idx: torch.Tensor, group_size: int) -> bool:
    """Return whether `g_idx` [in] lists the groups in order (GPTQ's `desc_act` is off)."""
    expected = torch.arange(len(g_idx), device=g_idx.device) // group_size
    return bool((g_idx == g_idx[0] + expected).all())


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [...] to uint8 [..., 8], lowest four bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8)


def pack_int4(groups: Int4Groups) -> PackedInt4:
    """Convert weights to the kernel layout.

    Raises AssertionError unless the group size is 64 or a multiple of 128.
    """
    in_size, out_size = groups.numbers.shape
    group_size = in_size // len(groups.scales)
    groups = _without_zero_scales(groups, group_size)
    size = min(group_size, max(GROUPS))
    assert size in GROUPS and group_size % size == 0, group_size
    blocks = -(-in_size // BLOCK)
    scales, zeros = (
        _padded(x.repeat_interleave(group_size // size, 0), blocks * BLOCK // size, filler)
        for x, filler in ((groups.scales.to(torch.float16), 1), (groups.zeros, 0))
    )
    numbers = _padded(groups.numbers, blocks * BLOCK)
    words = torch.zeros((blocks, out_size, WORDS), dtype=torch.int32, device=numbers.device)
    for j, chunk in enumerate(numbers.view(blocks, 4, CHUNK, out_size).unbind(1)):
        for half in range(2):
            words |= chunk[:, half::2].transpose(1, 2).int() << (4 * j + 16 * half)
    return PackedInt4(words, scales, zeros, in_size)


def _without_zero_scales(groups: Int4Groups, group_size: int) -> Int4Groups:
    """Return equal weights without zero scales: scale 1 and all values at the zero point."""
    none = groups.scales.to(torch.float16) == 0
    if not none.any():
        return groups
    return Int4Groups(
        groups.numbers.masked_fill(none.repeat_interleave(group_size, 0), 0),
        groups.zeros.masked_fill(none, 0),
        groups.scales.masked_fill(none, 1),
    )


def unpack_int4(packed: PackedInt4) -> Int4Groups:
    """Invert `pack_int4`; groups are of 64 or 128 inputs."""
    chunks = []
    for j in range(4):
        pair = [(packed.words >> (4 * j + 16 * half)) & 15 for half in range(2)]
        chunks.append(torch.stack(pair, dim=-1).flatten(2).transpose(1, 2))
    numbers = torch.cat(chunks, dim=1).flatten(0, 1)[: packed.in_size].to(torch.uint8)
    groups = packed.in_size // packed.group_size
    return Int4Groups(numbers, packed.zeros[:groups], packed.scales[:groups])


def _padded(x: torch.Tensor, rows: int, filler: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)), value=filler).contiguous()
