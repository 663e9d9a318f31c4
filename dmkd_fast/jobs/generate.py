"""Generate a directory of images in shards, by any number of jobs: `dmkd generate`.

Image ids, classes and noise are those of online generation with the same config. Slice i of n jobs
makes the missing ones among the shards i, i + n, i + 2 n, and so on. A job may be killed at any
time. The result depends neither on which job makes a shard nor on how often jobs are killed.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.classifiers.loading import for_inference
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.data import shards
from dmkd_fast.jobs import memory, networks
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.evaluate import open_test_set
from dmkd_fast.jobs.image_maker import Image, Maker
from dmkd_fast.jobs.images import attention_facts, job_class_names, open_denoiser
from dmkd_fast.jobs.parts import check_fit
from dmkd_fast.jobs.resolve import resolve, resolve_images
from dmkd_fast.jobs.stored_logits import LogitsMaker, Wanted, plan_of
from dmkd_fast.runtime import distributed
from dmkd_fast.runtime.device import available_bytes
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.runtime.output.progress import Phase, Progress
from dmkd_fast.runtime.signals import Interrupts
from dmkd_fast.sampling.labels import LabelStream

# Estimates for the check of free space. Per image: bytes of tar headers, padding and manifest row;
# per byte of raw pixels: bytes of PNG.
BYTES_BESIDE, BYTES_PER_PIXEL = 2000, 0.6
USUAL_SHARD = 1024
LOG = logging.getLogger("dmkd_fast")


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
        "job_slice": "{}/{}".format(*job_slice),
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
    mine = range(job_slice[0], plan.num_shards, job_slice[1])
    images = len(mine) * plan.images_per_shard
    if plan.num_shards - 1 in mine:  # the last shard may be shorter
        images -= plan.num_shards * plan.images_per_shard - plan.num_images
    images -= sum(len(plan.ids(number)) for number in shards.finished(folder) if number in mine)
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
