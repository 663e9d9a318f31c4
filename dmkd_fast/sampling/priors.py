"""Procedural images: what a job trains on where there is neither a generator nor data.

An image is a scene of a few overlapping shapes, each with a color and a texture: dead leaves over
noise of several scales, stripes, shapes cut out of other textures, often symmetric, often on black.
Nothing is learned from data. The teacher's output is all that is known of such an image, so the
images have no classes.

An image is a function of (seed, id), in any batch.

Sources: dead leaves, Lee et al., "Occlusion models for natural images", IJCV 2001, and Baradad et
al. (arXiv 2106.05963); images without meaning for distillation, Asano & Saeed (arXiv 2112.00725);
noise of several scales and masks, DIP-KD (arXiv 2604.25794).

Shapes: B images, c channels, H x W pixels, K shapes of a scene.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmkd_fast.rng import philox
from dmkd_fast.sampling.labels import LabelStream

MOST_SHAPES = 6
DARK, MIRRORED, STRIPED = 0.5, 0.5, 0.3
"""Probabilities of a black background, of symmetry, and of a texture of stripes."""
TOGETHER = 2**17
"""Pixels times channels that are drawn at once, few enough for the caches of a CPU."""
TAPER, CENTERED = 0.7, 0.8
"""How much shapes may narrow to one end, and how close the first, larger one is to the center."""
_SCENE, _SHAPE = 20, 10
"""Random numbers of a scene, and of a shape, beside those of colors."""


class PriorImages:
    """Draw the images of a run by a procedure, without a network.

    Args:
        ids: Source of image ids; its classes are not used.
        image_shape: Shape of one image, (c, H, W).
    """

    is_exhausted = False
    may_wait = False

    def __init__(self, ids: LabelStream, image_shape: tuple[int, int, int]) -> None:
        self.ids, self.image_shape = ids, image_shape

    @property
    def rewrites(self) -> list[Callable[..., object]]:
        """The method `draw`, as an image is a function of its id."""
        return [self.draw]

    def next_block(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next ids, (count,) int64, and zeros for their classes."""
        ids, _ = self.ids.peek(count)
        return ids, torch.zeros_like(ids)

    def write(self, ids: Tensor, labels: Tensor, out: Tensor, *, progress: float) -> None:
        """Draw one image per id into `out`, (B, c, H, W) uint8."""
        del progress
        self.draw(ids, labels, out=out)

    def draw(self, ids: Tensor, labels: Tensor, *, out: Tensor) -> None:
        """Draw one image per id into `out`; any rank may call this alone."""
        del labels
        some = max(1, TOGETHER // math.prod(self.image_shape))
        for part, target in zip(ids.to(out.device).split(some), out.split(some), strict=True):
            target.copy_(scenes(self.ids.seed, part, self.image_shape).mul_(255).round_())

    def advance(self, count: int) -> None:
        """Move past the `count` images that each rank got from `next_block`."""
        self.ids.advance(count)

    def warm_up(self, scratch: Tensor) -> None:
        """Do nothing: no part compiles."""

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Return no counts."""
        del device
        return {}

    def check(self, counts: Mapping[str, int]) -> None:
        """Do nothing: images are finite by construction."""

    def totals(self) -> dict[str, float]:
        """Return no figures."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the next id."""
        return self.ids.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.ids.load_state_dict(state)


@torch.no_grad()
def scenes(seed: int, ids: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Draw scenes.

    Args:
        seed: Seed of all images.
        ids: Image ids, (B,) int64.
        image_shape: Shape of one image, (c, H, W).

    Returns:
        (B, c, H, W) float32 in [0, 1].
    """
    channels, height, width = image_shape
    numbers = philox.uniform(
        seed,
        ids,
        step=0,
        stream=philox.STREAM_PRIORS,
        count=_SCENE + channels + MOST_SHAPES * (_SHAPE + channels),
    )[..., None, None]  # one number for all pixels of an image
    of_scene, background, of_shapes = numbers.split(
        [_SCENE, channels, MOST_SHAPES * (_SHAPE + channels)], dim=1
    )
    of_shapes = of_shapes.unflatten(1, (MOST_SHAPES, _SHAPE + channels))
    draw = iter(of_scene.unbind(1))
    is_mirrored, is_dark = next(draw) < MIRRORED, next(draw) < DARK
    x = torch.linspace(-1, 1, width, device=ids.device).expand(len(ids), height, width)
    y = torch.linspace(-1, 1, height, device=ids.device)[:, None].expand_as(x)
    x = torch.where(is_mirrored, x.abs(), x)
    plane = (1, height, width)
    textures = [
        _stripes(_noise(seed, ids, number, image_shape, 2 * next(draw)), x, y, draw)
        for number in (1, 2)
    ]
    outline = _noise(seed, ids, 3, plane, 0.5 + next(draw), most=8)[:, 0]
    textures = [torch.where(is_mirrored[:, None], _mirrored(t), t) for t in textures]
    outline = torch.where(is_mirrored, _mirrored(outline), outline)
    outline = outline * (0.5 * next(draw))
    count, contrast = 1 + (MOST_SHAPES * next(draw)).floor(), 0.5 * next(draw).square()
    gain = torch.exp2(0.5 * (next(draw) - 0.5))
    image: Tensor = (background + contrast[:, None] * textures[0]) * ~is_dark[:, None]
    for k, numbers_of_shape in enumerate(of_shapes.unbind(1)):
        cover = _cover(numbers_of_shape, k, x, y, outline, is_mirrored) * (k < count)
        paint = 0.6 * numbers_of_shape[:, 9:10].square() * textures[k % 2]
        paint = paint + numbers_of_shape[:, _SHAPE:]
        image = torch.lerp(image, paint, cover[:, None])
    return (image * gain[:, None]).clamp_(0, 1)


def _noise(
    seed: int,
    ids: Tensor,
    number: int,
    shape: tuple[int, int, int],
    slope: Tensor,
    most: int | None = None,
) -> Tensor:
    """Draw the sum of noises of several scales, (B, c, H, W), with variance of about 1.

    Args:
        seed: Seed of all images.
        ids: Image ids, (B,) int64.
        number: Number of the draw of an image.
        shape: (c, H, W).
        slope: Octaves by which each finer scale is weaker, (B, 1, 1).
        most: Most cells a side of the finest scale; None: those of the image.
    """
    channels, height, width = shape
    sides = [2**i for i in range(1, max(height, width).bit_length()) if 2**i < max(height, width)]
    scales = [(min(side, height), min(side, width)) for side in sides]
    scales = [*scales, (height, width)] if most is None else [s for s in scales if max(s) <= most]
    scales = scales or [(1, 1)]
    counts = [channels * h * w for h, w in scales]
    drawn = philox.normal(seed, ids, step=number, count=sum(counts)).split(counts, dim=1)
    total = torch.zeros(len(ids), *shape, device=ids.device)
    power = torch.zeros_like(slope)
    for octave, (scale, values) in enumerate(zip(scales, drawn, strict=True)):
        weight = torch.exp2(-slope * octave)
        cells = values.reshape(-1, channels, *scale) * weight[:, None]
        if scale != (height, width):
            cells = F.interpolate(cells, size=(height, width), mode="bilinear", align_corners=True)
        total += cells
        power += weight.square()
    return total * power.rsqrt()[:, None]


def _stripes(noise: Tensor, x: Tensor, y: Tensor, draw: Any) -> Tensor:
    """Replace some noises (B, c, H, W) by stripes that the noise bends."""
    is_striped, angle, octave, phase, bend = (next(draw) for _ in range(5))
    # Between half a period and a third of the pixels' rate across the image.
    rate = math.pi * torch.exp2(octave * math.log2(max(2.0, max(noise.shape[2:]) / 3)))
    angle = math.pi * angle
    wave = rate * (angle.cos() * x + angle.sin() * y) + 2 * math.pi * phase
    wave = (wave + bend * noise[:, 0]).sin()
    return torch.where((is_striped < STRIPED)[:, None], wave[:, None] + 0.3 * noise, noise)


def _mirrored(field: Tensor) -> Tensor:
    """Return a field (..., W) whose right half mirrors its left half."""
    width = field.shape[-1]
    left = field[..., : -(-width // 2)]
    return torch.cat([left, left[..., : width // 2].flip(-1)], dim=-1)


def _cover(
    numbers: Tensor, k: int, x: Tensor, y: Tensor, outline: Tensor, is_mirrored: Tensor
) -> Tensor:
    """Return how much each pixel is covered by a box or an ellipse, (B, H, W) in [0, 1].

    Args:
        numbers: Random numbers of the shape, (B, 10 + c, 1, 1).
        k: Number of the shape; later ones are smaller.
        x, y: Coordinates of the pixels, (B, H, W) in [-1, 1].
        outline: What is added to the distance from the shape, (B, H, W).
        is_mirrored: Whether x is the distance from the axis of symmetry, (B, 1, 1).
    """
    across, down, size, aspect, angle, kind, sharpness, is_upright, taper = numbers[:, :9].unbind(1)
    size = 0.15 + 0.75 * size * (0.5 + 1 / (2 + k))
    near = 1.0
    if k == 0:  # Make the first shape larger and more central, like the subject of a photo.
        size, near = torch.lerp(size, 0.4 + 0.5 * size, CENTERED), 1 - CENTERED
    stretch = torch.exp2(1.5 * aspect - 0.75)
    angle = math.pi * angle * (is_upright >= 0.5)
    dx = x - near * torch.where(is_mirrored, 0.9 * across, 1.6 * across - 0.8)
    dy = y - near * (1.6 * down - 0.8)
    a = (angle.cos() * dx + angle.sin() * dy) / (size * stretch)
    b = (angle.cos() * dy - angle.sin() * dx) / (size / stretch)
    a = a / (1 + TAPER * (2 * taper - 1) * b.clamp(-1, 1))
    box, ellipse = torch.maximum(a.abs(), b.abs()), torch.hypot(a, b)
    distance = torch.where(kind < 0.5, box, ellipse) - 1 + outline
    pixels = size * min(x.shape[1:])  # The edge is a pixel wide, or soft.
    return torch.sigmoid(-distance * pixels * torch.exp2(2 - 4 * sharpness.pow(4)))
