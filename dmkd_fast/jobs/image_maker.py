"""Make the images of `dmkd generate`, with their rows of the manifest, from image ids."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.classifiers.ensemble import Teachers
from dmkd_fast.data.test_sets import ImageSet
from dmkd_fast.jobs.stored_logits import LogitsMaker
from dmkd_fast.runtime.device import exact_float32
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.sampler import DiffusionSampler, check_broken

Image = tuple[int, int, bytes, dict[str, Any], dict[str, bytes] | None]
"""Id, class, PNG, manifest row and stored logits of an image, as `ShardWriter.add` takes them."""


class Started(NamedTuple):
    """A micro-batch whose work is queued on the device, with the copies to the host."""

    ids: range
    tensors: dict[str, Tensor]
    """On the host: images, label, guess and probability of the teacher, number of broken images."""
    logits: dict[str, Tensor] | None
    num_made: int
    done: torch.cuda.Event | None
    """Event after which the tensors may be read; None on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes images and rows of the manifest from image ids."""

    sampler: DiffusionSampler
    """Source of the images."""
    labels: LabelStream
    """Classes by image id."""
    teachers: Teachers
    """Teachers whose guesses enter the manifest."""
    logits: LogitsMaker | None
    """Producer of the logits to store; None: none are stored."""
    image_shape: tuple[int, int, int]
    """Shape of one image, (c, H, W)."""
    row: dict[str, Any]
    """Columns of the manifest that are the same for all images."""
    attention: str
    """Attention kernel of the denoiser, and the operator that its library chooses."""
    pool: ThreadPoolExecutor
    """Threads that encode PNGs."""

    def make(self, batches: Iterable[range]) -> Iterator[list[Image]]:
        """Make the micro-batches of ids in order.

        A GPU makes the next micro-batch while the host encodes and writes one.
        """
        num_ahead = 1 if self.sampler.device.type == "cuda" else 0
        queued: deque[Started] = deque()
        for ids in batches:
            queued.append(self.start(ids))
            if len(queued) > num_ahead:
                yield self.finish(queued.popleft())
        while queued:
            yield self.finish(queued.popleft())

    def start(self, ids: range) -> Started:
        """Queue the work for one micro-batch, without waiting for the device."""
        device = self.sampler.device
        numbers = torch.arange(ids.start, ids.stop, device=device)
        labels = self.labels.labels_of(numbers)
        images = torch.empty((len(ids), *self.image_shape), dtype=torch.uint8, device=device)
        self.sampler.sample(numbers, labels, out=images)
        whole = ImageSet(images=images, labels=labels, class_names=())
        wanted = self.teachers.inputs_at(1.0)
        with exact_float32():
            logits = [self.teachers.predict(views) for views, _ in whole.batches(wanted)]
        guesses = torch.cat(logits).softmax(dim=1).max(dim=1)
        made = {
            "images": images,
            "label": labels,
            "guess": guesses.indices,
            "probability": guesses.values,
            "broken": self.sampler.num_broken.clone(),
        }
        if self.sampler.denoiser.prompts:
            made["prompt"] = self.sampler.own_indices(numbers, labels)
        stored = None if self.logits is None else self.logits.start(images, labels, numbers)
        made = {name: value.to("cpu", non_blocking=True) for name, value in made.items()}
        if stored is not None:
            stored = {name: value.to("cpu", non_blocking=True) for name, value in stored.items()}
        done = None
        if device.type == "cuda":
            cuda: Any = torch.cuda  # its events have no static types
            done = cuda.Event(blocking=True)
            done.record(cuda.current_stream(device))
        return Started(ids, made, stored, self.sampler.num_made, done)

    def finish(self, batch: Started) -> list[Image]:
        """Wait for one micro-batch, and encode it.

        Raises:
            NotFiniteError: Too many images so far have values that are not finite.
            UserError: Logits to store are not finite.
        """
        if batch.done is not None:
            batch.done.synchronize()
        host = batch.tensors
        pngs = self.pool.map(to_png, host["images"].numpy())
        check_broken(int(host["broken"]), batch.num_made)
        stored: Iterable[dict[str, bytes] | None] = [None] * len(batch.ids)
        if self.logits is not None and batch.logits is not None:
            stored = self.logits.finish(batch.logits)
        prompts: Iterable[dict[str, str]] = itertools.repeat({}, len(batch.ids))
        if texts := self.sampler.denoiser.prompts:
            prompts = [{"prompt": texts[index]} for index in host["prompt"].tolist()]
        columns = (host[name].tolist() for name in ("label", "guess", "probability"))
        made = []
        for image_id, label, guess, probability, png, arrays, prompt in zip(
            batch.ids, *columns, pngs, stored, prompts, strict=True
        ):
            scale = self.sampler.guidance.scale_of(label)
            row = {"guidance_scale": scale, "teacher_class": guess}
            row["teacher_probability"] = probability
            made.append((image_id, label, png, self.row | row | prompt, arrays))
        return made


def to_png(pixels: np.ndarray) -> bytes:
    """Encode pixels (c, H, W) uint8 as a lossless PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
