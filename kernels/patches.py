"""Cut uint8 frames into normalized patches, on the device that encodes them.

The order of patches and of values in a patch is that of transformers' `Qwen2VLImageProcessor`:
patches run frame by frame in merge_size × merge_size squares; a patch is
[channel, time, row, column].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import uses_triton

Triple = tuple[float, float, float]

SETTINGS = {"num_warps": 4}


@triton.jit
def _cut_patches_kernel(
    pixels_ptr,
    out_ptr,
    num_frames,
    height,
    width,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    PATCH: tl.constexpr,
    TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write one patch per program."""
    index = tl.program_id(0)
    rows, columns = height // PATCH, width // PATCH
    t, within = index // (rows * columns), index % (rows * columns)
    square, corner = within // (MERGE * MERGE), within % (MERGE * MERGE)
    row = square // (columns // MERGE) * MERGE + corner // MERGE
    column = square % (columns // MERGE) * MERGE + corner % MERGE

    SIZE: tl.constexpr = 3 * TEMPORAL * PATCH * PATCH
    offs = tl.arange(0, BLOCK_SIZE)
    mask = offs < SIZE
    x, y = offs % PATCH, offs // PATCH % PATCH
    frame = tl.minimum(t * TEMPORAL + offs // (PATCH * PATCH) % TEMPORAL, num_frames - 1)
    channel = offs // (TEMPORAL * PATCH * PATCH)
    line = frame.to(tl.int64) * height + row * PATCH + y
    at = (line * width + column * PATCH + x) * 3 + channel
    pixel = tl.load(pixels_ptr + at, mask=mask, other=0).to(tl.float32)
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
    value = (pixel * scale + shift).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + index.to(tl.int64) * SIZE + offs, value, mask=mask)


def cut_patches(
    pixels: torch.Tensor,
    mean: Triple,
    std: Triple,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return normalized patches [t × h × w, 3 × temporal × patch × patch] in `dtype`.

    Args:
        pixels: uint8 frames [frames, H, W, 3]. H and W are multiples of patch_size × merge_size.
            The last frame is repeated to fill a temporal patch, as for a single image.
        mean, std: Per-channel normalization of pixel values scaled to [0, 1].
    """
    if not uses_triton(pixels):
        return cut_patches_ref(
            pixels, mean, std, patch_size, temporal_patch_size, merge_size, dtype
        )
    pixels = pixels.contiguous()
    frames, height, width, _ = pixels.shape
    count = -(-frames // temporal_patch_size) * (height // patch_size) * (width // patch_size)
    size = 3 * temporal_patch_size * patch_size**2
    out = torch.empty((count, size), dtype=dtype, device=pixels.device)
    _cut_patches_kernel[(count,)](
        pixels,
        out,
        frames,
        height,
        width,
        *(1 / (255 * s) for s in std),
        *(-m / s for m, s in zip(mean, std, strict=True)),
        PATCH=patch_size,
        TEMPORAL=temporal_patch_size,
        MERGE=merge_size,
        BLOCK_SIZE=triton.next_power_of_2(size),
        **SETTINGS,
    )
    return out


def cut_patches_ref(
    pixels: torch.Tensor,
    mean: Triple,
    std: Triple,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute `cut_patches` in plain torch (test oracle); same arguments and result."""
    frames, height, width, _ = pixels.shape
    missing = -frames % temporal_patch_size
    if missing:
        pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))
    scale = 1 / (255 * torch.tensor(std, device=pixels.device))
    shift = -torch.tensor(mean, device=pixels.device) / torch.tensor(std, device=pixels.device)
    square = patch_size * merge_size
    down = (height // square, merge_size, patch_size)
    across = (width // square, merge_size, patch_size)
    normed = pixels.float() * scale + shift
    order = (0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, square y/x, patch y/x in it, channel, time, y, x
    size = 3 * temporal_patch_size * patch_size**2
    cut = normed.reshape(-1, temporal_patch_size, *down, *across, 3).permute(order)
    return cut.reshape(-1, size).to(dtype)
