"""Decode large images in overlapping tiles, which takes the memory of one tile.

Shapes: B images, c channels, h x w latent cells, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmkd_fast.runtime.errors import invalid

FEWEST_CELLS = 8


class TiledDecoder(nn.Module):
    """A decoder that runs on overlapping tiles of the latents and blends their images.

    Neighboring tiles overlap by a quarter of a tile or more, where the images are averaged with
    weights that fall linearly towards the end of each tile.

    Args:
        decoder: Module that turns latents (B, c, h, w) into images (B, 1 or 3, H, W).
        tile: Side of a tile in pixels.
        latent_shape: Shape of one image's latents, (c, h, w).
        image_shape: Shape of one image, (1 or 3, H, W).

    Raises:
        UserError: A tile has no whole number of latent cells, or fewer than 8 a side.
    """

    def __init__(
        self,
        decoder: nn.Module,
        tile: int,
        *,
        latent_shape: tuple[int, int, int],
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.decoder, self.image_shape = decoder, image_shape
        self.scale = image_shape[1] // latent_shape[1]
        if tile % self.scale or tile < FEWEST_CELLS * self.scale:
            expected = f"a multiple of {self.scale}, {FEWEST_CELLS * self.scale} or more"
            raise invalid("denoiser.decoder_tile", tile, expected, "change it")
        self.places = [_places(side, tile // self.scale) for side in latent_shape[1:]]

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to images (B, 1 or 3, H, W) float32."""
        images = latents.new_zeros((len(latents), *self.image_shape), dtype=torch.float32)
        rows, columns = (self._weighted(places, latents.device) for places in self.places)
        for y, row in rows:
            for x, column in columns:
                cells = latents[:, :, _scaled(y, 1), _scaled(x, 1)]
                weight = row[:, None] * column
                images[:, :, _scaled(y, self.scale), _scaled(x, self.scale)] += (
                    self.decoder(cells).float() * weight
                )
        return images

    def _weighted(self, places: list[range], device: torch.device) -> list[tuple[range, Tensor]]:
        """Return each place with the weights of its pixels; they add up to 1 at each pixel."""
        if len(places) == 1:
            return [(places[0], torch.ones(len(places[0]) * self.scale, device=device))]
        side = places[-1].stop * self.scale
        ramps = torch.zeros(len(places), side, device=device)
        for ramp, place in zip(ramps, places, strict=True):
            size = len(place) * self.scale
            rising = torch.arange(size, device=device) + 0.5
            ramp[_scaled(place, self.scale)] = torch.minimum(rising, size - rising)
        # At the border of the image only one tile has a weight, so that its ramp has no effect.
        ramps = ramps / ramps.sum(0)
        return [
            (place, ramp[_scaled(place, self.scale)])
            for place, ramp in zip(places, ramps, strict=True)
        ]


def _places(side: int, tile: int) -> list[range]:
    """Return the cells of each tile along a side, evenly spread, so that a quarter overlaps."""
    if side <= tile:
        return [range(side)]
    count = -(-(side - tile) // (tile - tile // 4)) + 1
    starts = [round(i * (side - tile) / (count - 1)) for i in range(count)]
    return [range(start, start + tile) for start in starts]


def _scaled(place: range, scale: int) -> slice:
    return slice(place.start * scale, place.stop * scale)
