"""A stream of images from disk.

The order of images is a function of (seed, pass, position). The only state is a cursor and the
order in which shards were found.

Shapes: B images of a request, N images of the source, c channels, H x W pixels.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.data import decode
from dmkd_fast.data.decode import Decoder
from dmkd_fast.data.listing import SourceError
from dmkd_fast.data.sources import Source
from dmkd_fast.rng import philox
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.views.spec import InputSpec

POLL_S = 0.5


class StoredImages:
    """Read the images of a source in passes over it.

    The first pass over shards follows their order, which is the order of online generation. It
    needs no shuffling, because ids are balanced and their noise is independent. Every other pass is
    shuffled in a new order. In pass k, image i has the id i + k * num_images, so it gets new views.

    Args:
        source: Source of the images.
        decoder: Decoder of the images.
        ring_images: Number of slots of the ring, summed over all ranks. A source that fits into the
            ring is read once, see `is_exhausted`.
        seed: Seed of the order.
        wait_s: Seconds to wait for new images of a growing source.
        show: Whether to print a message while waiting.
        ranks: Ranks of the run, which read alternating blocks, as with a `LabelStream`. An image
            that one rank cannot read stops all ranks.

    Attributes:
        waits: Duration of each wait for a growing source, in seconds.
    """

    may_wait = True

    def __init__(
        self,
        source: Source,
        decoder: ImageDecoder,
        *,
        ring_images: int,
        seed: int = 0,
        wait_s: float = 600.0,
        show: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self.source, self.decoder = source, decoder
        self.ring_images, self.seed, self.wait_s = ring_images, seed, wait_s
        self._show, self._ranks = show, ranks
        self.position = 0  # first position of the next turn, shared by all ranks
        self.waits: list[float] = []
        self._reported = -math.inf
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def is_exhausted(self) -> bool:
        """Whether all images were read and fit into the ring; more would repeat them."""
        count = self.source.num_images
        return self.source.is_complete and count <= self.ring_images and self.position >= count

    @property
    def rewrites(self) -> list[Callable[..., Tensor]]:
        """The method `read`, which any rank may call alone."""
        return [self.read]

    def next_block(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next ids and classes, (count,) int64 each, on the CPU.

        Waits until the images exist. A second call returns the same ids, until `advance` moves past
        them.

        Raises:
            SourceError: No new image appeared for `wait_s` seconds.
        """
        position = self.position + self._ranks.rank * count
        with self._ranks.agreed(SourceError):
            self._wait_for(position + count)
        total = self.source.num_images
        ids, labels = [], []
        while count:
            number, start = divmod(position, total)
            places = self._pass(number)[start : start + count]
            ids.append(places + number * total)
            labels.append(self.source.labels_of(places))
            position += len(places)
            count -= len(places)
        return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(labels))

    def advance(self, count: int) -> None:
        """Move past the `count` images that each rank got from `next_block`."""
        self.position += count * self._ranks.world_size

    def write(self, ids: Tensor, labels: Tensor, out: Tensor, *, progress: float = 0.0) -> None:
        """Read and decode images; all ranks must call this together.

        Args:
            ids: Image ids from `next_block`, (B,) int64 on the CPU.
            labels: Not used.
            out: Tensor for the images, (B, c, H, W) uint8, written in place.
            progress: Not used.

        Raises:
            SourceError: An image on some rank is damaged or has another size.
        """
        del progress
        with self._ranks.agreed(SourceError):
            self.read(ids, labels, out=out)

    def read(self, ids: Tensor, labels: Tensor, *, out: Tensor) -> Tensor:
        """Read and decode images on this rank alone, and return `out`."""
        del labels
        places = [int(i) % self.source.num_images for i in ids.tolist()]
        encoded = [self.source.read(place) for place in places]
        out.copy_(self.decoder.decode([self.source.name_of(p) for p in places], encoded))
        return out

    def warm_up(self, scratch: Tensor) -> None:
        """Do nothing: no part of the decoder compiles."""

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Return no counts."""
        del device
        return {}

    def check(self, counts: Mapping[str, int]) -> None:
        """Do nothing: `write` has checked every image."""

    def totals(self) -> dict[str, float]:
        """Return the seconds spent waiting for images."""
        return {"waited_s": round(sum(self.waits), 1)}

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor and the state of the source."""
        return {"position": self.position, "source": self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            SourceError: The directory is not the one that the run was reading.
        """
        self.source.load_state_dict(state["source"])
        self.position = state["position"]
        self._order = (-1, self._order[1])

    def _wait_for(self, position: int) -> None:
        """Wait until all images before `position` exist.

        Every pass after the first needs the whole source.
        """
        source = self.source
        started = latest = time.monotonic()
        has_waited = False
        while not source.is_complete and position > source.num_ready:
            if source.poll():
                latest = time.monotonic()
                continue
            there, now = f"{source.num_ready:,} of {source.num_images:,}", time.monotonic()
            if now - latest > self.wait_s:
                raise SourceError(
                    f"{source.folder}: {there} images are there and none came for "
                    f"{self.wait_s:g} s; start dmkd generate again, then go on with --resume"
                )
            if self._show and now - self._reported > 30:
                text = f"waiting for images: {there} are in {source.folder}"
                print(text, file=sys.stderr, flush=True)
                self._reported = now
            has_waited = True
            time.sleep(POLL_S)
        if has_waited:
            self.waits.append(time.monotonic() - started)

    def _pass(self, number: int) -> np.ndarray:
        """Return the image numbers of a pass, (N,) int64.

        The first pass over a growing source has only as many as exist.
        """
        if number == 0 and self.source.first_pass is not None:
            return self.source.first_pass
        if self._order[0] != number:
            everything = torch.arange(self.source.num_images)
            keys = philox.random_bits(
                self.seed, everything, step=number, stream=philox.STREAM_ORDER, count=2
            )  # (N, 2)
            order = ((keys[:, 0] << 31) ^ keys[:, 1]).argsort(stable=True)
            self._order = (number, order.numpy())
        return self._order[1]


class ImageDecoder:
    """Decode images to one shape.

    Args:
        image_shape: Shape of the decoded images, (c, H, W).
        resize: Whether to resize and crop images of other sizes to the square `image_shape`, as an
            `InputSpec` of this size does; otherwise another size is an error.
        device: CPU, or a CUDA device with its index, which then decodes what DALI can decode there.
        num_threads: Number of decoding threads.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        resize: bool = False,
        device: torch.device | str = "cpu",
        num_threads: int = 1,
    ) -> None:
        self.image_shape, self.resize = image_shape, resize
        channels, height, _ = image_shape
        spec = InputSpec(size=height, mean=(0.0,) * channels, std=(1.0,) * channels)
        self._decoder = Decoder(
            channels, [spec] if resize else [], device=torch.device(device), num_threads=num_threads
        )

    def decode(self, names: list[str], encoded: list[bytes]) -> Tensor:
        """Decode images to (B, c, H, W) uint8 on the device of the decoder.

        Args:
            names: Names of the images, for messages.
            encoded: Contents of the image files.

        Raises:
            SourceError: An image is damaged or has another size.
        """
        rows, columns = self.image_shape[1:]
        for name, data in () if self.resize else zip(names, encoded, strict=True):
            height, width = decode.image_size(name, data)
            if (height, width) != (rows, columns):
                expected, fix = f"{columns} x {rows}", "set source.image_size to scale all images"
                raise SourceError.invalid(name, f"{width} x {height} pixels", expected, fix)
        return self._decoder.decode(names, encoded)[0]


def image_size(source: Source) -> tuple[int, int]:
    """Return height and width of a source's first image.

    Raises:
        SourceError: The first image cannot be read.
    """
    return decode.image_size(source.name_of(0), source.read(0))
