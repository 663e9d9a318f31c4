"""Random views of ring slots: parameters per sample, then one operation.

Stands on floor 2. A view is fixed by (seed, image id, use): it can be replayed on any machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmkd_fast.ops import noise, reference


class Views:
    """Draws a random crop and flip for each sample and renders it.

    The crop covers a share of the image's area drawn from `scale`, with an aspect ratio whose
    logarithm is uniform in `ratio`, in whole pixels. It lies anywhere inside the image and its
    black border.

    Args:
        size: Side of a view, in pixels.
        scale: Range of area shares; (1, 1) keeps the size.
        ratio: Range of width / height.
        pad: Width of the black border, in pixels. With scale (1, 1) this is "pad and crop".
        flip: Probability of a horizontal flip.
        mean, std: Per channel, of pixel values in [0, 1].
        dtype: Of the views.
        device: Where ring and models live.
        seed: Of the views; other seeds give other views.
    """

    def __init__(
        self, *, size: int, scale: tuple[float, float] = (1.0, 1.0),
        ratio: tuple[float, float] = (1.0, 1.0), pad: int = 0, flip: float = 0.5,
        mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", seed: int = 0,
    ) -> None:  # fmt: skip
        self.size, self.scale, self.ratio, self.pad, self.flip = size, scale, ratio, pad, flip
        self.seed, self.dtype = seed, dtype
        self.mean = torch.tensor(mean, device=device)
        self.std = torch.tensor(std, device=device)

    def __call__(self, slots: Tensor, indices: Tensor, ids: Tensor, uses: Tensor) -> Tensor:
        """Render one view per index.

        Args:
            slots: (N, c, H, W) uint8.
            indices: (B,) int64, slots to read.
            ids: (B,) int64, image ids in those slots.
            uses: (B,) int64, how often each image was used before.

        Returns:
            (B, c, size, size) in `dtype`, normalised, channels_last.
        """
        boxes, flips = self.parameters(ids, uses, slots.shape[-2], slots.shape[-1])
        return self.render(slots, indices, boxes, flips)

    def parameters(
        self, ids: Tensor, uses: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Boxes (B, 4) float32 (top, left, height, width) and flips (B,) bool."""
        u = noise.uniform(self.seed, ids, step=uses, stream=noise.STREAM_VIEWS, count=5)  # (B, 5)
        area = height * width * (self.scale[0] + u[:, 0] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(low + u[:, 1] * (high - low))
        rows = torch.sqrt(area / aspect).round().clamp(1, height)
        columns = torch.sqrt(area * aspect).round().clamp(1, width)
        down, right = height + 2 * self.pad - rows, width + 2 * self.pad - columns
        top = (u[:, 2] * (down + 1)).floor() - self.pad
        left = (u[:, 3] * (right + 1)).floor() - self.pad
        return torch.stack((top, left, rows, columns), dim=1), u[:, 4] < self.flip

    def whole(self, slots: Tensor, indices: Tensor) -> Tensor:
        """The unchanged images at view size, normalised: what evaluation uses."""
        count, (height, width) = indices.shape[0], slots.shape[-2:]
        boxes = torch.tensor([[0.0, 0.0, height, width]], device=slots.device).expand(count, 4)
        return self.render(slots, indices, boxes, torch.zeros_like(indices, dtype=torch.bool))

    def render(self, slots: Tensor, indices: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        """Views (B, c, size, size) of given boxes and flips."""
        return reference.views(
            slots, indices, boxes, flips, size=self.size, pad=self.pad,
            mean=self.mean, std=self.std, dtype=self.dtype,
        )  # fmt: skip
