"""Write the configs of all jobs from a folder of images to a student: `dmkd init own-data`.

The sizes follow from the images and from the kind of device. The times are measured here, with
random weights, and decide nothing.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.config.data import RealImagesConfig
from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.shipped import with_comments, write_new
from dmkd_fast.config.yaml_text import dump_flow
from dmkd_fast.data.decode import image_size, is_transparent
from dmkd_fast.data.listing import Item, SourceError
from dmkd_fast.data.test_sets import EncodedSet, open_set
from dmkd_fast.jobs.pretrain import own_time
from dmkd_fast.jobs.pretrain.real_data import TESTS, RealData, has_parts, load_real
from dmkd_fast.runtime.device import keep_freed_memory, resolve_device, set_num_threads
from dmkd_fast.runtime.errors import UserError, invalid, warn_once

# Images of a folder that are looked at to choose the size and the channels.
SAMPLE = 200
FEWSTEP_STEPS, TEACHER_STEPS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of networks and lengths of runs for one kind of device; by default those for a CPU.

    On two CPU cores, the jobs of a set of ten classes take minutes.
    """

    most_side: int = 32
    """Largest side of the images to train at."""
    layers: int = 3
    heads: int = 4
    head_dim: int = 32
    batch_size: int = 64
    teacher_views: int = 12_288
    denoiser_batch_size: int = 32
    denoiser_views: int = 40_960
    denoiser_lr: float = 5e-3
    fewstep_views: int = 16_384
    pool_images: int = 512
    student_views: int = 40_960
    ring_images: int = 2_048
    channels: tuple[int, ...] = (32, 64, 128, 128)
    """Widths of the stages of the teacher; the student has half of them."""


# The sizes for CUDA have not been run on real hardware.
SIZES = {
    "cpu": Sizes(),
    "cuda": Sizes(
        most_side=64,
        layers=8,
        heads=6,
        head_dim=64,
        batch_size=256,
        teacher_views=1_048_576,
        denoiser_batch_size=256,
        denoiser_views=8_388_608,
        denoiser_lr=3e-3,
        fewstep_views=1_048_576,
        pool_images=16_384,
        student_views=2_097_152,
        ring_images=32_768,
        channels=(64, 128, 256, 512),
    ),
}


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """What a folder of labeled images holds."""

    folder: Path
    test: Path
    """Folder of the test set."""
    real: RealData
    """Its images, at the size to train at."""
    data: RealImagesConfig
    stored: str
    """Sizes of the images as stored, for example `64 x 48`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images to train on."""
        channels, height, width = self.real.train.images.shape[1:]
        return channels, height, width

    def describe(self) -> str:
        """Return one line about the classes, counts and sizes."""
        real, names = self.real, self.real.train.class_names
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        counts = torch.bincount(real.train.labels.cpu(), minlength=len(names))
        few, many = int(counts.min()), int(counts.max())
        tested = "no" if real.test is None else f"{len(real.test):,}"
        return (
            f"{self.folder}: {len(names)} classes ({shown}); {len(real.train):,} images to train "
            f"on ({few if few == many else f'{few} to {many}'} a class), {len(real.held_out):,} "
            f"held out, {tested} to test; {self.stored} pixels, "
            f"{'color' if self.shape[0] == 3 else 'gray'}"
        )


def init(folder: Path, out: Path) -> dict[str, Any]:
    """Look at a folder, write the configs of its jobs, and print the commands with their minutes.

    Args:
        folder: Folder of labeled images; see `load_real` in `real_data.py`.
        out: Folder of the configs.

    Returns:
        The written configs and the predicted minutes of each job.

    Raises:
        UserError: The folder has no labeled images or no test set, its path cannot be written to
            a config, or a config exists already.
    """
    text = str(folder)
    # What is not UTF-8 is replaced, and then differs.
    if text.encode(errors="replace").decode().splitlines() != [text]:
        raise invalid("--data", ascii(text), "a path of one line in UTF-8", "rename the folder")
    set_num_threads(0)
    keep_freed_memory()
    device = resolve_device("auto")
    names = [out / f"{job}.yaml" for job in ("teacher", "denoiser", "fewstep", "distill")]
    for path in names:
        if path.exists():
            raise UserError(f"{path}: exists already; move it or work in another folder")
    found = look(folder, device)
    print(found.describe())
    texts = _texts(found, SIZES[device.type])
    for path, text in zip(names, texts, strict=True):
        write_new(path, with_comments(text, path.stem))
    teacher, denoiser, fewstep, distill = names
    seconds = own_time.predict(
        load_config(TeacherConfig, teacher),
        load_config(PretrainDenoiserConfig, denoiser),
        load_config(PretrainFewstepConfig, fewstep),
        load_config(DistillConfig, distill),
        shape=found.shape,
        num_classes=len(found.real.train.class_names),
    )
    side = found.shape[1]
    total = sum(seconds.values()) / 60
    print(f"wrote {', '.join(path.name for path in names)}: {side} pixels, on {device.type}")
    print(f"next, in about {total:.1f} minutes:")
    for path, text in zip(names, texts, strict=True):
        command = text.partition("\n")[0].removeprefix("# ")
        print(f"  {command}  # {seconds[path.stem] / 60:.1f} min")
    print("  dmkd report runs/student")
    return {
        "configs": [str(path) for path in names],
        "minutes": {job: round(value / 60, 2) for job, value in seconds.items()},
    }


def look(folder: Path, device: torch.device) -> OwnData:
    """Read the images of a folder at the size to train at.

    Raises:
        UserError: The folder has no labeled images, or no test set.
    """
    if not folder.is_dir():
        raise UserError(f"--data: {folder}: no such folder; give one with labeled images")
    if any(folder.glob("*-images-idx3-ubyte*")):
        data = RealImagesConfig(channels=1)
        real = load_real(folder, device, data)
        _, height, width = real.train.images.shape[1:]
        stored = f"{width} x {height}"
        if height != width:
            data = RealImagesConfig(channels=1, image_size=_side(min(height, width), device))
            real = load_real(folder, device, data)
        return OwnData(folder=folder, test=folder, real=real, data=data, stored=stored)
    tests = [folder / name for name in TESTS if (folder / name).is_dir()]
    if not (has_parts(folder) and tests):
        raise invalid(
            "--data",
            f"no train/ with one of {', '.join(TESTS)} in {folder}",
            "both, as a student is tested on images that nothing was trained on",
            "move most images of each class to train/CLASS and some to test/CLASS",
        )
    encoded = open_set(folder / "train", device)
    if not isinstance(encoded, EncodedSet):
        got, fix = f"idx files in {folder / 'train'}", f"give {folder / 'train'} itself"
        raise invalid("--data", got, "class folders or shards", fix)
    sizes = _look_at(encoded.items[:: max(1, len(encoded.items) // SAMPLE)], folder)
    shorts = sorted(min(size) for size in sizes)
    data = RealImagesConfig(image_size=_side(shorts[len(shorts) // 2], device))
    real = load_real(folder, device, data)
    sample = real.train.images[:: max(1, len(real.train) // SAMPLE)]
    if bool((sample == sample[:, :1]).all()):
        data = data.model_copy(update={"channels": 1})
        real = load_real(folder, device, data)
    heights, widths = zip(*sizes, strict=True)
    stored = f"{_range(widths)} x {_range(heights)}"
    return OwnData(folder=folder, test=tests[0], real=real, data=data, stored=stored)


def _look_at(items: Sequence[Item], folder: Path) -> list[tuple[int, int]]:
    """Return the heights and widths of images, and log how many are partly transparent.

    Images that cannot be read are left to `load_real`, which reports all of them.
    """
    sizes, transparent = [], 0
    for item in items:
        with contextlib.suppress(SourceError):
            data = item.read()
            sizes.append(image_size(item.name, data))
            transparent += is_transparent(data)
    if transparent:
        warn_once(
            f"{folder}: {transparent} of {len(sizes)} images looked at are partly transparent; "
            "transparency is dropped, which shows the colors stored below, often black. To put "
            "them on white: mogrify -background white -alpha remove FILE..."
        )
    return sizes or [(1, 1)]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _side(short: int, device: torch.device) -> int:
    """Return the side to train at for images with this short side: a multiple of 8, or 8."""
    return max(8, min(short, SIZES[device.type].most_side) // 8 * 8)


def _texts(found: OwnData, sizes: Sizes) -> list[str]:
    """Return the text of the four configs in order; the first line of each is its command."""
    side = found.shape[1]
    sample = found.real.train.images[:1000].float() / 255
    mean, std = round(sample.mean().item(), 3), round(max(sample.std().item(), 1e-3), 3)
    # Many classes need longer runs than the ten that the lengths are made for.
    longer = max(1.0, len(found.real.train.class_names) / 10)
    views = f"{{size: {side}, pad: {side // 16}, flip: 0.5}}"
    patch = next(size for size in ((4, 3, 2, 1) if side > 16 else (2, 1)) if side % size == 0)
    data = found.data.model_dump(exclude_defaults=True)
    section = f"data: {dump_flow(data)}\n" if data else ""
    where = shlex.quote(str(found.folder))

    def optim(name: str, lr: float, decay: float, clip: str = "") -> str:
        return (
            f"optim: {{name: {name}, lr: {lr}, weight_decay: 0.01, warmup: 0.05, "
            f"ema_decay: {decay}{clip}}}\n"
        )

    def train(num_views: int, batch: int = sizes.batch_size) -> str:
        views = int(num_views * longer)
        return f"train: {{batch_size: {batch}, num_views: {views}, log_every_steps: 50}}\n"

    def network(widths: Iterable[int]) -> str:
        args = f"{{layers: [1, 1, 1, 1], channels: {dump_flow([*widths])}}}"
        return f"  arch: resnet18\n  stem: conv3_stride2\n  model_args: {args}\n"

    clip = ", max_grad_norm: 1.0"
    # Muon makes a more accurate teacher, but its students of generated images are no better.
    teacher = (
        f"# dmkd pretrain teacher teacher.yaml run_dir=runs/teacher --data {where}\n"
        "# Set views.flip to 0 if left and right matter.\n"
        f"name: teacher\n{section}mean: {mean}\nstd: {std}\n"
        f"model:\n{network(sizes.channels)}views: {views}\n"
        f"{optim('adamw', 3e-3, 0.99)}{train(sizes.teacher_views)}"
    )
    denoiser = (
        f"# dmkd pretrain denoiser denoiser.yaml run_dir=runs/denoiser --data {where}\n"
        "# More layers and more views make better images.\n"
        f"name: denoiser\n{section}patch_size: {patch}\nnum_layers: {sizes.layers}\n"
        f"num_heads: {sizes.heads}\nhead_dim: {sizes.head_dim}\n"
        f"{optim('adamw', sizes.denoiser_lr, 0.99, clip)}"
        f"{train(sizes.denoiser_views, sizes.denoiser_batch_size)}"
    )
    block = min(128, sizes.pool_images)
    fewstep = (
        "# dmkd pretrain fewstep fewstep.yaml run_dir=runs/fewstep\n"
        f"# {FEWSTEP_STEPS} evaluations an image, in place of {2 * TEACHER_STEPS} guided ones.\n"
        "name: fewstep\ndenoiser: {path: runs/denoiser/model}\n"
        f"sampler: {{num_steps: {TEACHER_STEPS}, solver: dpm++2m, guidance_scale: 1.5, "
        f"micro_batch_images: {block}}}\n"
        f"num_steps: {FEWSTEP_STEPS}\npool_images: {sizes.pool_images}\nreuse: 8\n"
        f"{optim('adamw', 5e-4, 0.97, clip)}{train(sizes.fewstep_views)}"
    )
    ring, test = sizes.ring_images, dump_flow(str(found.test))
    distill = (
        "# dmkd distill distill.yaml run_dir=runs/student\n"
        "# Set views.flip to 0 if left and right matter.\n"
        "name: student\ndenoiser: {path: runs/fewstep/model}\n"
        f"sampler: {{num_steps: {FEWSTEP_STEPS}, guidance_scale: 1, "
        f"micro_batch_images: {block}}}\n"
        f"ring: {{capacity_images: {ring}, min_fill_images: {ring // 4}, "
        f"samples_per_insert: 16, order: equal}}\n"
        f"views: {views}\nteacher: {{path: runs/teacher/model}}\n"
        f"student:\n{network(width // 2 for width in sizes.channels)}loss: {{temperature: 4.0}}\n"
        f"{optim('muon', 1e-2, 0.99)}{train(sizes.student_views)}"
        f"eval: {{path: {test}, num_points: 4}}\n"
    )
    return [teacher, denoiser, fewstep, distill]
