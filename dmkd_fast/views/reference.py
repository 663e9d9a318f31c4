"""Eager definition of the views operator: what the kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor

from dmkd_fast.rng import philox


def reference_views(
    slots: Tensor, indices: Tensor, boxes: Tensor, flips: Tensor, *,
    size: int, pad: int, mean: Tensor, std: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gather, crop, resize (bilinear, antialiased), flip, normalise, cast: one view per row.

    Resampling is separable: rows and columns are weighted by triangle filters over the pixels whose
    centres lie in the box, written as two batched matrix products. The filter widens with the crop
    where that shrinks by more than 1.15. Equals cropping first and then torchvision's `resize`.

    Args:
        slots: (N, c, H, W) uint8.
        indices: (B,) int64 slot numbers.
        boxes: (B, 4) int32: top, left, height, width in pixels; may reach `pad` beyond the image.
        flips: (B,) bool, horizontal.
        size: Side of a view.
        pad: Width of the black border.
        mean, std: (c,) float32 of pixel values in [0, 1].
        dtype: Of the result; float64 is computed in float64, everything else in float32.

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


def _filter(start: Tensor, length: Tensor, source: int, size: int, pad: int) -> Tensor:
    """Weights (B, size, source) float64 that resample [start, start + length) to `size` pixels.

    Distances between pixels of crop and view are whole multiples of 1 / (2 * size), so the weights
    are ratios of integers.
    """
    pixels = (
        torch.arange(-pad, source + pad, device=start.device) - start[:, None]
    )  # (B, W + 2 pad)
    centres = (2 * torch.arange(size, device=start.device) + 1) * length[:, None]  # (B, S)
    gaps = ((2 * pixels + 1) * size)[:, None] - centres[..., None]  # (B, S, W + 2 pad)
    support = torch.where(20 * length > 23 * size, length, size)
    inside = (pixels >= 0) & (pixels < length[:, None])
    shares = (2 * support[:, None, None] - gaps.abs()).clamp_min(0) * inside[:, None]
    weights = shares.double() / shares.sum(-1, keepdim=True)
    return weights[..., pad : pad + source]


def reference_boxes(
    seed: int, ids: Tensor, uses: Tensor, height: int, width: int, pad: int,
    area_low: int, area_high: int, shape_low: int, shape_high: int,
    spare_height: int, spare_width: int, tries: int, flip: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The crop and flip of each view, from (seed, image id, use) and nothing else.

    The first of `tries` crops that fits into the image counts, at any place in the image and its
    border; if none does, the spare one, in the middle (with `tries` 0: anywhere). Integers, one
    square root and single products in float64: the same bits on every device, fused or not.

    Args:
        seed: Non-negative, below 2**63.
        ids: (B,) int64, image ids.
        uses: (B,) int64, below 2**24.
        height, width, pad: Of the images and their black border, in pixels.
        area_low, area_high: Range of the crop's share of the image's area, in 2**-24.
        shape_low, shape_high: Range of log2(width / height) / 2, in 2**-24, within [-8, 8).
        spare_height, spare_width: Of the spare crop, in pixels.
        tries: At most 10.
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
    share = area_low + (((area_high - area_low) * tops[..., 0]) >> 24)
    shape = shape_low + (((shape_high - shape_low) * tops[..., 1]) >> 24)
    root = (height * width * share).double().sqrt()  # of the area, times 2**12
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
    # As a tensor: a Python number would be compared in float64 by the compiler.
    return boxes, uniform[:, 2] < torch.tensor(flip, device=ids.device)


# 2^f for f in [0, 1), both in fixed point; lowest degree first; relative error 2.1e-7.
EXP2 = (1073741824, 744261544, 257920167, 59763036, 9874991, 1921638)


def _side(root: Tensor, power: Tensor) -> Tensor:
    """root * 2^(power - 12), power in 2^-24, rounded to an integer."""
    fraction = power & 0xFFFFFF
    factor = torch.full_like(power, EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        factor = coefficient + ((factor * fraction) >> 24)
    factor = factor << ((power >> 24) + 8)
    return (root * factor.double() * 2.0**-50 + 0.5).floor().long()


def _position(uniform: Tensor, room: Tensor, anywhere: Tensor) -> Tensor:
    """A place from 0 to room, or the middle."""
    # In float32 a uniform number may round to 1.
    place = torch.minimum((uniform * (room + 1).float()).floor().long(), room)
    return torch.where(anywhere, place, room // 2)
