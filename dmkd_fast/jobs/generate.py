"""Generate a directory of images in shards, by any number of jobs: `dmkd generate`.

Image ids, classes and noise are those of online generation with the same config. Slice i of n jobs
makes the missing ones among the shards i, i + n, i + 2 n, and so on. A job may be killed at any
time. The result depends neither on which job makes a shard nor on how often jobs are killed.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import logging
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmkd_fast.classifiers.ensemble import Teachers
from dmkd_fast.classifiers.loading import for_inference
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.data import shards
from dmkd_fast.data.test_sets import ImageSet
from dmkd_fast.jobs import memory, networks
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.evaluate import open_test_set
from dmkd_fast.jobs.images import attention_facts, job_class_names, open_denoiser
from dmkd_fast.jobs.parts import check_fit
from dmkd_fast.jobs.resolve import resolve, resolve_images
from dmkd_fast.jobs.stored_logits import LogitsMaker, Wanted, plan_of
from dmkd_fast.runtime import distributed
from dmkd_fast.runtime.device import available_bytes, exact_float32
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.runtime.output.progress import Phase, Progress
from dmkd_fast.runtime.signals import Interrupts
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.sampler import DiffusionSampler, check_broken

# Estimates for the check of free space. Per image: bytes of tar headers, padding and manifest row;
# per byte of raw pixels: bytes of PNG.
BYTES_BESIDE, BYTES_PER_PIXEL = 2000, 0.6
USUAL_SHARD = 1024
LOG = logging.getLogger("dmkd_fast")


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
    labels: LabelStream
    teachers: Teachers
    logits: LogitsMaker | None
    image_shape: tuple[int, int, int]
    row: dict[str, Any]
    """Columns of the manifest that are the same for all images."""
    attention: str
    """Attention kernel of the denoiser, and the operator that its library chooses."""
    pool: ThreadPoolExecutor

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
            done.record()
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


def run(
    config: DistillConfig,
    folder: Path,
    num_images: int,
    *,
    job_slice: tuple[int, int] | None = None,
    images_per_shard: int | None = None,
    logits: Wanted | None = None,
    command: str = "the same call",
    show: bool = True,
) -> dict[str, Any]:
    """Make this job's slice of a directory of images; finished shards are only checked.

    Args:
        config: Config, of which the denoiser, sampler, seed, dtype, device, teachers and test set
            (for class names) are used.
        folder: Directory of the images; created if it does not exist.
        num_images: Number of images of the complete directory, ids 0 to num_images - 1.
        job_slice: Pair (i, n): make the shards i, i + n, i + 2 n, ...; None: all shards, or
            this rank's slice under torchrun.
        images_per_shard: Images in a shard, a multiple of sampler.micro_batch_images; None: about
            1,024.
        logits: What to store of the teacher's logits; None: nothing.
        command: Command that continues the job, printed after an interrupt.
        show: Whether to print progress.

    Returns:
        The summary that the command line prints as its last line.

    Raises:
        UserError: A setting, the directory or the machine does not allow this job.
        KeyboardInterrupt: Ctrl-C or SIGTERM arrived; the directory is consistent.
    """
    started, ranks, display = time.monotonic(), distributed.read(), Progress(show=show)
    job_slice = job_slice or (ranks.rank, ranks.world_size)
    advice = f"lower sampler.micro_batch_images={config.sampler.micro_batch_images}"
    with ThreadPoolExecutor() as pool, memory.named(advice):
        maker, plan = _prepare(config, num_images, images_per_shard, logits, pool)
        _check_space(folder, plan, job_slice)
        shards.claim(folder, plan)
        name = "{}-of-{}".format(*job_slice)
        with shards.locked(folder, name):
            missing = _missing(folder, plan, job_slice, display)
            total, interrupts = sum(len(plan.ids(s)) for s in missing), Interrupts()
            try:
                with interrupts, display.phase("generating", total, "images") as phase:
                    size = maker.sampler.micro_batch_images
                    batches = (_batches(plan.ids(number), size) for number in missing)
                    made = maker.make(itertools.chain.from_iterable(batches))
                    for number in missing:
                        count = len(_batches(plan.ids(number), size))
                        writer = shards.ShardWriter(folder, number, name, plan)
                        _make_shard(made, count, writer, interrupts, phase)
            except KeyboardInterrupt:
                print(f"every finished shard is kept; to go on: {command}", file=sys.stderr)
                raise
            except OSError as error:
                raise UserError(_out_of_space(folder, error, command)) from None
    there = sum(len(plan.ids(s)) for s in shards.finished(folder))
    wall_s = time.monotonic() - started
    return {
        "part": "{}/{}".format(*job_slice),
        "made_images": total,
        "images": there,
        "num_images": num_images,
        "is_complete": there == num_images,
        "images_per_s": round(phase.rate(), 1),
        "wall_s": round(wall_s, 1),
        "attention": maker.attention,
        "denoiser_license": plan.license,
        "run_dir": str(folder),
    }


def _prepare(
    config: DistillConfig,
    num_images: int,
    images_per_shard: int | None,
    logits: Wanted | None,
    pool: ThreadPoolExecutor,
) -> tuple[Maker, shards.Plan]:
    """Load all networks, and build the plan, which lists everything that images depend on."""
    if config.source is not None:
        raise UserError("source: got it, expected a denoiser to make images with; change config")
    if config.hooks:
        expected = "none, as a directory's images depend on config and id alone"
        fix = "remove it to make the images without them"
        raise invalid("hooks", ", ".join(config.hooks), expected, fix)
    if config.sampler.phases:
        expected = "none, as a directory's images are all made alike"
        fix = "set sampler.phases=[], or make a directory for each phase"
        raise invalid("sampler.phases", "some", expected, fix)
    job = resolve(config, distributed.read())
    device = job.device
    teachers = networks.load_teachers(
        config.teachers, temperature=config.loss.temperature, device=device
    )
    known = job_class_names(config, teachers.class_names["teacher"])
    denoiser = open_denoiser(config.denoiser, device, job.dtype, known)
    job = resolve_images(job, denoiser)
    config = job.config
    assert config.denoiser is not None
    # A class_map states the order of the classes, so that other names are compared, not mapped.
    names = () if config.teacher.class_map else teachers.class_names["teacher"]
    test_set = open_test_set(
        config.eval.path, config.eval.classes, device, denoiser.num_classes, names
    )
    check_fit(config, denoiser, teachers, test_set)
    batch = config.sampler.micro_batch_images
    made = {memory.BLOCK: 4 * batch * math.prod(denoiser.image_shape)}
    memory.check_fits(made, available_bytes(device))
    images_per_shard = images_per_shard or -(-USUAL_SHARD // batch) * batch
    if images_per_shard % batch:
        multiple = f"a multiple of sampler.micro_batch_images={batch}"
        raise invalid("--images-per-shard", images_per_shard, multiple, "change one of the two")
    prompts_of = {}
    if denoiser.prompts:
        text = json.dumps([denoiser.prompts, denoiser.num_prompts])
        prompts_of["prompts_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    settings = {
        "seed": config.seed,
        "dtype": config.dtype,
        "denoiser": config.denoiser.model_dump(mode="json"),
        "denoiser_sha256": networks.weights_sha256(*denoiser.modules),
        **prompts_of,
        "sampler": config.sampler.model_dump(mode="json", exclude={"fidelity"}),
        "teachers": {
            name: teacher.model_dump(mode="json", exclude={"stored"})
            for name, teacher in config.teachers.items()
        },
        "teacher_sha256": networks.weights_sha256(teachers.together),
    }
    stored = None if logits is None else plan_of(config, logits, denoiser.num_classes)
    plan = shards.Plan(
        num_images=num_images,
        images_per_shard=images_per_shard,
        image_shape=denoiser.image_shape,
        num_classes=denoiser.num_classes,
        class_names=test_set.class_names,
        license=denoiser.license,
        settings=settings,
        teacher_logits=stored,
    )
    maker = Maker(
        sampler=make_sampler(job, denoiser),
        pool=pool,
        teachers=teachers.together.mapped(
            lambda module, input: for_inference(module, torch.float32, input)
        ),
        logits=None if stored is None else LogitsMaker(job, teachers, stored),
        labels=LabelStream(denoiser.num_classes, seed=config.seed, device=device),
        image_shape=denoiser.image_shape,
        row={
            "seed": config.seed,
            "num_steps": config.sampler.num_steps,
            "solver": config.sampler.solver,
            "denoiser": config.denoiser.path,
            "revision": config.denoiser.revision,
        },
        **attention_facts(denoiser, device, config.dtype),
    )
    return maker, plan


def _batches(ids: range, size: int) -> list[range]:
    """Return the micro-batches of a shard."""
    return [range(start, min(start + size, ids.stop)) for start in ids[::size]]


def _make_shard(
    made: Iterator[list[Image]],
    num_batches: int,
    writer: shards.ShardWriter,
    interrupts: Interrupts,
    phase: Phase,
) -> None:
    try:
        for _ in range(num_batches):
            batch = next(made)
            for image in batch:
                writer.add(*image)
            phase.advance(len(batch))
        with interrupts.held():
            writer.commit()
    finally:
        writer.discard()


def _missing(
    folder: Path, plan: shards.Plan, job_slice: tuple[int, int], display: Progress
) -> list[int]:
    """Return the missing shards of this slice; finished shards are read once and checked."""
    done = set(shards.finished(folder))
    mine = range(job_slice[0], plan.num_shards, job_slice[1])
    there = done & set(mine)
    for number in display.track(there, "checking", len(there), "shards", size=lambda _: 1):
        try:
            shard = shards.load_shard(folder, plan, number)
            for image_id in plan.ids(number):
                shard.read(image_id)
                if shard.logits is not None:
                    shard.read_logits(image_id)
        except shards.SourceError as error:
            LOG.warning("made again: %s", error)
            shards.withdraw(folder, number)
            done.discard(number)
    missing = [number for number in mine if number not in done]
    if len(missing) < len(mine):
        display.note(f"{len(mine) - len(missing)} of {len(mine)} shards are there")
    return missing


def _check_space(folder: Path, plan: shards.Plan, job_slice: tuple[int, int]) -> None:
    """Refuse to start if the disk has less space than this slice is estimated to need."""
    index, count = job_slice
    done = sum(1 for number in shards.finished(folder) if number % count == index)
    images = (-(-plan.num_shards // count) - done) * plan.images_per_shard
    images = min(images, plan.num_images)
    beside = BYTES_BESIDE + plan.logits_bytes
    need = images * (beside + BYTES_PER_PIXEL * math.prod(plan.image_shape))
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"--num-images: {images:,} images to make take about {need / 2**30:,.1f} GiB, "
            f"{free / 2**30:,.1f} GiB are free in {there}; lower it or choose another --out"
        )


def _out_of_space(folder: Path, error: OSError, command: str) -> str:
    what = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return f"--out: {what} in {folder}; every finished shard is kept; fix it, then: {command}"


def to_png(pixels: np.ndarray) -> bytes:
    """Encode pixels (c, H, W) uint8 as a lossless PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
