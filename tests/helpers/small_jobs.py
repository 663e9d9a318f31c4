"""Small jobs that tests share: a shortened config, a tiny denoiser, a small Distiller."""

from __future__ import annotations

import atexit
import gzip
import shutil
import signal
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rings import new_ring
from torch import Tensor, nn

from dmkd_fast import (
    Denoiser,
    DiffusionSampler,
    Distiller,
    GeneratedImages,
    Guidance,
    LabelStream,
    Mixer,
    Objective,
    Schedule,
    Steps,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
)
from dmkd_fast.assets import resolve
from dmkd_fast.data.test_sets import ImageSet
from dmkd_fast.jobs.pretrain.denoiser import FLOW
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.training.images import ImageStream

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "many_steps.yaml")


def few_test_images(count: int = 500) -> Path:
    """Write the first embedded test images as idx files, and return their folder."""
    folder = Path(tempfile.mkdtemp(prefix="few-test-images-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
        file = f"t10k-{name}-ubyte.gz"
        with gzip.open(resolve("embedded:fashion_mnist/test") / file) as whole:
            data = bytearray(whole.read(header + count * size))
        data[4:8] = count.to_bytes(4, "big")
        (folder / file).write_bytes(gzip.compress(data, 1))
    return folder


SHORT = [
    "num_threads=1",
    "dtype=float32",
    "sampler.num_steps=1",
    "sampler.guidance_scale=1",
    "sampler.compile=false",
    "sampler.micro_batch_images=64",
    "ring.capacity_images=192",
    "ring.min_fill_images=64",
    "ring.samples_per_insert=4",
    "teacher.path=embedded:fashion_mnist/weak",
    "train.batch_size=32",
    "train.num_views=640",
    "train.log_every_steps=5",
    "eval.num_points=1",
    f"eval.path={few_test_images()}",
    "student={arch: lenet5_half}",
]


class TinyDenoiser(nn.Module):
    """A network whose velocity depends on latents, time and label; it makes no useful images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mix = nn.Conv2d(1, 1, 3, padding=1)
        self.embed = nn.Embedding(5, 1)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        shift = self.embed(labels)[:, :, None, None] * (timesteps / 1000)[:, None, None, None]
        return self.mix(latents) + shift.to(latents.dtype)


def sampler_from(**settings: Any) -> DiffusionSampler:
    """Build a sampler from the fields of its three parts and its own arguments, in one list."""
    parts: list[Any] = []
    for kind in (Denoiser, Steps, Guidance):
        names = {field.name for field in fields(kind)} & settings.keys()
        parts.append(kind(**{name: settings.pop(name) for name in names}))
    return DiffusionSampler(*parts, **settings)


def tiny_sampler(**changes: object) -> DiffusionSampler:
    """Build a sampler of 8 x 8 images of four classes."""
    settings: dict[str, object] = {
        "module": TinyDenoiser(),
        "scheduler": FLOW,
        "latent_shape": (1, 8, 8),
        "num_classes": 4,
        "null_class": 4,
        "count": 3,
        "scale": 2.0,
        "micro_batch_images": 16,
    }
    return sampler_from(**(settings | changes))


def small_classifier(*, dropout: float = 0.0) -> nn.Module:
    """Build a classifier of 8 x 8 images in four classes, with batch norm and optional dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * 64, 4),
    )


def build_distiller(
    run_dir: Path,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    ring: dict[str, Any] | None = None,
    images: ImageStream | None = None,
    mix: dict[str, float] | None = None,
    alpha: float = 1.0,
    objective: Objective | None = None,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    student: nn.Module | None = None,
    ranks: Ranks = ALONE,
    test_set: ImageSet | None = None,
    **changes: object,
) -> Distiller:
    """Build a whole run at reduced size: 8 x 8 images, 4 classes, 40 steps, a ring of 4 blocks.

    With several ranks, each has its part of the ring, and batch_size is that of each rank.
    """
    if images is None:
        labels = LabelStream(4, seed=seed, rank=ranks.rank, world_size=ranks.world_size)
        images = GeneratedImages(labels, tiny_sampler(seed=seed), ranks=ranks)
    torch.manual_seed(5)
    teacher = small_classifier()
    torch.manual_seed(7 + seed)
    student = student or small_classifier(dropout=dropout)
    schedule = {"batch_size": 16, "num_views": 640, "lr": 3e-3, "log_every_steps": 10}
    return Distiller(
        images,
        new_ring(
            capacity_images=64 // ranks.world_size,
            min_fill_images=32 // ranks.world_size,
            seed=ranks.seed(seed),
            **(ring or {}),
        ),
        StudentTrainer(
            student,
            Schedule(**(schedule | changes)),  # type: ignore[arg-type]
            objective or Objective(alpha=alpha),
            dtype=dtype,
            compile=compile,
            ranks=ranks,
        ),
        Targets(
            teacher,
            Views(ViewSpec(size=8, mean=(0.5,), std=(0.5,)), pad=1, seed=seed),
            mixer=Mixer(**mix, seed=seed) if mix else None,  # type: ignore[arg-type]
            dtype=dtype,
        ),
        run_dir,
        test_set=test_set,
        show=False,
    )


def sampler_of(distiller: Distiller) -> DiffusionSampler:
    """Return the first sampler of a run on generated images."""
    assert isinstance(distiller.images, GeneratedImages)
    return distiller.images.samplers[0][1]


def labels_of(distiller: Distiller) -> LabelStream:
    """Return the labels of a run on generated images."""
    assert isinstance(distiller.images, GeneratedImages)
    return distiller.images.labels


def fit_until(distiller: Distiller, stop_at: int) -> None:
    """Train until Ctrl-C right after step `stop_at`."""
    step = distiller.train_step

    def interrupted() -> Tensor:
        loss = step()
        if distiller.step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return loss

    distiller.train_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        distiller.fit()
