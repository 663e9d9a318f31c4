"""Images from disk in place of a sampler and a label stream, decoded by NVIDIA DALI.

`Distiller` calls `peek` and `advance` where it would call a LabelStream, and
`sample` where it would call a DiffusionSampler, so after the ring nothing differs. The order is a
function of (seed, pass, position); the only state is a cursor and which shards were there when.
B images of a request, c channels, H W pixels.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.data import decode
from dmkd_fast.data.decode import check_dali as check_dali
from dmkd_fast.data.listing import SourceError as SourceError
from dmkd_fast.data.sources import Source
from dmkd_fast.rng import philox

POLL_S = 0.5


class ImageReader:
    """Hands out the images of a source in passes over it.

    The first pass over shards is in their order (ids are balanced and their noise independent, so
    it needs no shuffling, and it is the order of online generation); other passes are shuffled, a
    new order each. In pass k image i is called i + k * num_images, so it gets new views.

    Args:
        source: What to read.
        image_shape: (c, H, W) of what is handed out.
        resize: Whether images of other sizes are scaled, short side first, bilinear and
            antialiased, and cropped to the centre; otherwise they are an error.
        ring_images: Slots of the ring, of all ranks. A set that fits is handed out once: see
            `is_exhausted`.
        device: A CUDA device, with its index, decodes there what DALI can.
        num_threads: Of decoding.
        seed: Of the order.
        wait_s: Seconds to wait for new images of a source that still grows.
        show: Whether to say that it waits.
        rank, world_size: Several ranks take turns, as with a LabelStream.

    Attributes:
        waits: Seconds of each wait for a growing source.

    Raises:
        SourceError: DALI is not installed.
    """

    def __init__(
        self, source: Source, *, image_shape: tuple[int, int, int], resize: bool = False,
        ring_images: int, device: torch.device | str = "cpu", num_threads: int = 1, seed: int = 0,
        wait_s: float = 600.0, show: bool = True, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        check_dali()
        self.source, self.image_shape, self.resize = source, image_shape, resize
        self.ring_images, self.device = ring_images, torch.device(device)
        self.num_threads, self.seed, self.wait_s, self.show = num_threads, seed, wait_s, show
        self.rank, self.world_size = rank, world_size
        self.position = 0  # Of all ranks together, as it was when this one's turn came.
        self.waits: list[float] = []
        self._told = -math.inf
        self._pipeline: Any = None
        self._pipeline_batch = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def is_exhausted(self) -> bool:
        """Whether every image is in the ring, so that inserting would only repeat them."""
        count = self.source.num_images
        return self.source.is_complete and count <= self.ring_images and self.position >= count

    def peek(self, count: int) -> tuple[Tensor, Tensor]:
        """The next ids and their classes, (count,) int64 each, on the CPU; waits until they exist.

        Raises:
            SourceError: Nothing new came for `wait_s` seconds.
        """
        position = self.position + self.rank * count
        self._wait_for(position + count)
        total = self.source.num_images
        ids, labels = [], []
        while count:
            number, start = divmod(position, total)
            part = self._pass(number)[start : start + count]
            ids.append(part + number * total)
            labels.append(self.source.labels_of(part))
            position += len(part)
            count -= len(part)
        return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(labels))

    def advance(self, count: int) -> None:
        """Count the next `count` images as used."""
        self.position += count * self.world_size

    def sample(self, ids: Tensor, labels: Tensor, *, out: Tensor) -> Tensor:
        """Read and decode images.

        Args:
            ids: (B,) int64 from `peek`, on the CPU.
            labels: Not used; the signature is DiffusionSampler's.
            out: (B, c, H, W) uint8, written in place.

        Returns:
            `out`.

        Raises:
            SourceError: A file is damaged or has another size.
        """
        del labels
        places = [int(i) % self.source.num_images for i in ids.tolist()]
        encoded = [self.source.read(place) for place in places]
        for place, data in zip(places, encoded, strict=True):
            self._check_size(place, data)
        out.copy_(self._decode(places, encoded))
        if out.is_cuda:  # DALI writes its buffer again without waiting for this copy.
            torch.cuda.current_stream(out.device).synchronize()
        return out

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what was there."""
        return {"position": self.position, "source": self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            SourceError: The directory is not what the run was reading.
        """
        self.source.load_state_dict(state["source"])
        self.position = state["position"]
        self._order = (-1, self._order[1])

    def _wait_for(self, position: int) -> None:
        """Until the images before `position` exist; those of later passes need all images."""
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
            if self.show and now - self._told > 30:
                text = f"waiting for images: {there} are in {source.folder}"
                print(text, file=sys.stderr, flush=True)
                self._told = now
            has_waited = True
            time.sleep(POLL_S)
        if has_waited:
            self.waits.append(time.monotonic() - started)

    def _pass(self, number: int) -> np.ndarray:
        """Image numbers of a pass, (num_images,) or as many as exist, int64."""
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

    def _check_size(self, place: int, data: bytes) -> None:
        """Look at the header before anything is decoded."""
        name, rows, columns = self.source.name_of(place), *self.image_shape[1:]
        short_side = max(rows, columns) if self.resize else 1
        height, width = decode.image_size(name, data, short_side=short_side)
        if not self.resize and (height, width) != (rows, columns):
            raise SourceError(
                f"{name}: got {width} x {height} pixels, expected {columns} x {rows}; set "
                "source.image_size to scale all images"
            )

    def _decode(self, places: list[int], encoded: list[bytes]) -> Tensor:
        """Encoded images -> (B, c, H, W) uint8, on the CPU or where DALI runs."""
        if self._pipeline is None or len(encoded) > self._pipeline_batch:
            self._pipeline, self._pipeline_batch = self._build(len(encoded)), len(encoded)
        try:
            # NumPy, because DALI asks torch tensors for a CUDA stream, driver or not.
            arrays = [np.frombuffer(data, dtype=np.uint8) for data in encoded]
            self._pipeline.feed_input("encoded", arrays)
            (images,) = self._pipeline.run()
            if self.device.type == "cuda":
                decoded = torch.from_dlpack(images.as_tensor())
            else:
                decoded = torch.from_numpy(images.as_array())
            if decoded.shape[1:] != self.image_shape:
                raise RuntimeError(f"got {tuple(decoded.shape[1:])}, expected {self.image_shape}")
            return decoded
        except torch.OutOfMemoryError:
            raise  # no image is to blame
        except RuntimeError as error:
            self._pipeline = None  # DALI gives a pipeline up after an error.
            reason = decode.reason_of(error)
            raise SourceError(self._blame(places, encoded, reason)) from None

    def _blame(self, places: list[int], encoded: list[bytes], reason: str) -> str:
        """Which image could not be decoded: DALI does not say."""
        for place, data in zip(places, encoded, strict=True):
            try:
                pipeline = self._build(1)
                pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8)])
                pipeline.run()
            except RuntimeError:
                return f"{self.source.name_of(place)}: damaged, cannot be decoded; replace it"
        return f"{self.source.name_of(places[0])} or one of the next: cannot be decoded ({reason})"

    def _build(self, batch_size: int) -> Any:
        """The DALI pipeline: decode, scale if wanted, channels first."""
        channels, height, width = self.image_shape
        pipeline = decode.new_pipeline(
            batch_size=batch_size, num_threads=self.num_threads, device=self.device,
            prefetch_queue_depth=1,
        )  # fmt: skip
        from nvidia import dali

        fn: Any = dali.fn
        types: Any = dali.types
        with pipeline:
            data = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True)
            images = decode.decoded(data, self.device, channels)  # each (h, w, c)
            if self.resize:
                images = fn.resize(
                    images, mode="not_smaller", size=[height, width], antialias=True,
                    interp_type=types.INTERP_LINEAR,
                )  # fmt: skip
                images = fn.crop(images, crop=(height, width))
            pipeline.set_outputs(fn.transpose(images, perm=[2, 0, 1]))
        pipeline.build()
        return pipeline


def image_size(source: Source) -> tuple[int, int]:
    """Height and width of a source's first image.

    Raises:
        SourceError: It is not an image.
    """
    return decode.image_size(source.name_of(0), source.read(0))
