"""Draw random inputs for the views operator."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest error allowed: as a fraction of the pixel range, and relative to the result.
TOLERANCES = {
    torch.float32: (1e-6, 0),
    torch.float16: (1e-6, 2**-11),
    torch.bfloat16: (1e-6, 2**-8),
}
RECIPES = [  # images and border, area, shape, spare crop, tries
    (256, 256, 0, int(0.08 * 2**24), 2**24, -3481732, 3481732, 256, 256, 10),
    (100, 31, 5, int(0.08 * 2**24), 2**24, -3481732, 3481732, 41, 31, 10),
    (31, 100, 0, 2**24, 2**24, -3481732, 3481732, 31, 41, 10),
    (28, 28, 2, 2**24, 2**24, 0, 0, 28, 28, 0),
    (64, 64, 0, 2**23, 2**24, -(2**26), 2**26, 64, 64, 3),
]


def problem(
    rows: int, channels: int, height: int, width: int, size: int, pad: int, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict]:
    """Draw inputs of `views` with random boxes; every third has the view's size if possible."""
    torch.manual_seed(seed)
    slots = torch.randint(0, 256, (4, channels, height, width), dtype=torch.uint8)
    room = torch.tensor([height, width]) + 2 * pad
    extent = (torch.rand(rows, 2) * room).long() + 1
    if size <= room.min():
        extent[::3] = size
    start = (torch.rand(rows, 2) * (room - extent + 1)).long() - pad
    boxes = torch.cat((start, extent), 1).int()
    indices, flips = torch.randint(0, 4, (rows,)), torch.rand(rows) < 0.5
    mean, std = torch.rand(channels), torch.rand(channels) + 0.2
    return (slots, indices, boxes, flips), {"size": size, "pad": pad, "mean": mean, "std": std}
