"""Eager definitions of the view operators, which the kernels must reproduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmkd_fast.rng import philox


def reference_views(
    slots: Tensor,
    indices: Tensor,
    boxes: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    size: int,
    pad: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gather, crop, resize (bilinear, antialiased), flip, normalize and cast: one view per row.

    Resampling is separable: rows and columns are weighted by triangle filters over the pixels whose
    centers lie in the box, written as two batched matrix products. The filter widens with the crop
    where the crop shrinks by a factor of more than 1.15. Equals cropping first and then
    torchvision's `resize`.

    Args:
        slots: (N, c, H, W) uint8 images.
        indices: (B,) int64 slot numbers.
        boxes: (B, 4) int32: top, left, height, width in pixels. A box may reach up to `pad` pixels
            beyond the image.
        flips: (B,) bool, whether to flip horizontally.
        mean, std: (c,) float32, of pixel values in [0, 1].
        size: Side of a view, in pixels.
        pad: Width of the black border, in pixels.
        dtype: Dtype of the result. float64 is computed in float64, any other in float32.

    Returns:
        (B, c, size, size), channels_last.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    images = slots[indices].to(compute) / 255  # (B, c, H, W)
    top, left, height, width = boxes.long().unbind(1)
    rows = _filter(top, height, images.shape[-2], size, pad).to(compute)  # (B, S, H)
    columns = _filter(left, width, images.shape[-1], size, pad).to(compute)  # (B, S, W)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    out = rows[:, None] @ images @ columns.transpose(1, 2)[:, None]  # (B, c, S, S)
    out = (out - mean[:, None, None]) / std[:, None, None]
    return out.to(dtype, memory_format=torch.channels_last)


def new_views(slots: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    """Allocate the result of the operator `views`, whose arguments these are."""
    *_, size, _, dtype = rest
    return torch.empty(
        (indices.shape[0], slots.shape[1], size, size),  # `len` would fix the number under compile
        dtype=dtype,
        device=slots.device,
        memory_format=torch.channels_last,
    )


def _filter(start: Tensor, length: Tensor, source: int, size: int, pad: int) -> Tensor:
    """Return weights that resample [start, start + length) to `size` pixels.

    Distances between the pixels of crop and view are whole multiples of 1 / (2 * size), so the
    weights are ratios of integers. Shape (B, size, source), float64.
    """
    places = torch.arange(-pad, source + pad, device=start.device)
    pixels = places - start[:, None]  # (B, W + 2 pad)
    centers = (2 * torch.arange(size, device=start.device) + 1) * length[:, None]  # (B, S)
    gaps = ((2 * pixels + 1) * size)[:, None] - centers[..., None]  # (B, S, W + 2 pad)
    support = torch.where(20 * length > 23 * size, length, size)
    inside = (pixels >= 0) & (pixels < length[:, None])
    weights = (2 * support[:, None, None] - gaps.abs()).clamp_min(0) * inside[:, None]
    weights = weights.double() / weights.sum(-1, keepdim=True)
    return weights[..., pad : pad + source]


def reference_boxes(
    seed: int,
    ids: Tensor,
    uses: Tensor,
    height: int,
    width: int,
    pad: int,
    area_low: int,
    area_high: int,
    shape_low: int,
    shape_high: int,
    spare_height: int,
    spare_width: int,
    tries: int,
    flip: float,
) -> tuple[Tensor, Tensor]:
    """Draw the crop and flip of each view from (seed, image id, use) and nothing else.

    The first of `tries` crops that fits into the image is taken, anywhere in the image and its
    border. If none fits, the spare crop is taken, in the middle (with `tries` 0: anywhere). The
    arithmetic is integers, one square root, and single products in float64, so all devices give the
    same bits, with fused multiply-add or without.

    Args:
        seed: Seed, non-negative, below 2**63.
        ids: (B,) int64 image ids.
        uses: (B,) int64 use counts, below 2**24.
        height, width, pad: Sides of the images and width of their black border, in pixels.
        area_low, area_high: Range of the crop's fraction of the image area, in units of 2**-24.
        shape_low, shape_high: Range of log2(width / height) / 2, in units of 2**-24; as a number
            within [-8, 8).
        spare_height, spare_width: Sides of the spare crop, in pixels.
        tries: Number of crops to try, at most 10.
        flip: Probability of a horizontal flip.

    Returns:
        Boxes (B, 4) int32 (top, left, height, width), and flips (B,) bool.
    """
    count = 4 + 2 * max(tries, 1)
    bits = philox.random_bits(seed, ids, step=uses, stream=philox.STREAM_VIEWS, count=count)
    bits = bits >> 8  # (B, count)
    uniform = (bits[:, 2:5].float() + 0.5) * 2.0**-24  # (B, 3)
    # Words 0 and 1 are the first try, 2 to 4 position and flip, 6 and 7 the second try, ...
    tops = torch.cat((bits[:, :2], bits[:, 6:]), dim=1).unflatten(1, (-1, 2))  # (B, tries, 2)
    area = area_low + (((area_high - area_low) * tops[..., 0]) >> 24)
    shape = shape_low + (((shape_high - shape_low) * tops[..., 1]) >> 24)
    root = (height * width * area).double().sqrt()  # square root of the crop area, times 2**12
    rows, columns = _side(root, -shape), _side(root, shape)  # (B, tries)
    fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    if tries == 0:
        fits = torch.zeros_like(fits)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    rows = torch.where(found, rows.gather(1, first)[:, 0], spare_height)
    columns = torch.where(found, columns.gather(1, first)[:, 0], spare_width)
    anywhere = found if tries else torch.ones_like(found)
    top = _position(uniform[:, 0], height + 2 * pad - rows, anywhere) - pad
    left = _position(uniform[:, 1], width + 2 * pad - columns, anywhere) - pad
    boxes = torch.stack((top, left, rows, columns), dim=1).int()
    # `flip` as a tensor, since the compiler would compare a Python number in float64.
    return boxes, uniform[:, 2] < torch.tensor(flip, device=ids.device)


# Polynomial for 2^f, f in [0, 1), in fixed point; lowest degree first; relative error 2.1e-7.
EXP2 = (1073741824, 744261544, 257920167, 59763036, 9874991, 1921638)


def _side(root: Tensor, power: Tensor) -> Tensor:
    """Return root * 2^(power - 12), rounded to an integer; `power` is in units of 2^-24."""
    fraction = power & 0xFFFFFF
    factor = torch.full_like(power, EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        factor = coefficient + ((factor * fraction) >> 24)
    factor = factor << ((power >> 24) + 8)
    return (root * factor.double() * 2.0**-50 + 0.5).floor().long()


def _position(uniform: Tensor, room: Tensor, anywhere: Tensor) -> Tensor:
    """Return a random position from 0 to room, or the middle where `anywhere` is false."""
    # Limited to room, since a uniform number may round to 1 in float32.
    place = torch.minimum((uniform * (room + 1).float()).floor().long(), room)
    return torch.where(anywhere, place, room // 2)
