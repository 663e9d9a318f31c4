"""Plan a job: its work, memory and time, and what other settings would cost; `dmkd plan`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.overrides import Overrides
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.images import OpenSource
from dmkd_fast.jobs.inspect import gpus
from dmkd_fast.jobs.inspect import rates as speeds
from dmkd_fast.jobs.inspect.flops import Flops, evaluations_per_image, job_flops
from dmkd_fast.jobs.inspect.rates import Rates
from dmkd_fast.jobs.parts import Parts, prepare
from dmkd_fast.jobs.report.html import duration
from dmkd_fast.jobs.resolve import ResolvedJob
from dmkd_fast.ring.plan import RingPlan
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import UserError

# Values of ring.samples_per_insert whose cost is listed, and among which one is suggested.
REUSES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
# The suggested number of ranks finishes a run within this time.
WITHIN_S = 24 * 3600
MOST_RANKS = 64


def plan(
    config: str | Path | DistillConfig,
    overrides: Overrides = (),
    *,
    images_per_s: float | None = None,
    views_per_s: float | None = None,
    gpu: str | None = None,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Plan a job for this machine or for a GPU, without writing anything.

    Args:
        config: Path of a YAML file, or a config.
        overrides: Settings to change, as `load_config` takes them.
        images_per_s: Images generated per second. None: measured, or estimated with `gpu`.
        views_per_s: Views trained on per second. None: measured, or estimated with `gpu`.
        gpu: Name of a GPU whose rates are estimated and whose memory is planned.
        seconds: Seconds to measure images for, and views for.

    Returns:
        The plan, as `make` returns it.

    Raises:
        UserError: A setting or a file is wrong, or the run does not fit into memory.
    """
    started = time.perf_counter()
    job, parts = prepare(load_config(DistillConfig, config, overrides))
    load_s = time.perf_counter() - started
    flops, have = job_flops(parts), None
    both = {"images_per_s": images_per_s, "views_per_s": views_per_s}
    given: dict[str, Any] = {name: value for name, value in both.items() if value is not None}
    if gpu is not None:
        rates = speeds.estimate(gpu, flops, _steps(job, parts, flops)[1])
        have = int(gpus.GPUS[gpu].memory_gb * 1e9)
        job = replace(job, dtype=torch.float16)
    elif len(given) == 2:
        rates = Rates(origin="as given", load_s=load_s)
    else:
        memory.check(job, parts)
        print(f"measuring for about {2 * seconds:.0f} s ...", file=sys.stderr, flush=True)
        rates = speeds.measure(job, parts, seconds=seconds, load_s=load_s)
    if given and len(given) < 2:
        rates = replace(rates, origin=f"{rates.origin}, {', '.join(given)} as given")
    return make(job, parts, replace(rates, **given), flops=flops, have=have)


def make(
    job: ResolvedJob,
    parts: Parts,
    rates: Rates,
    *,
    flops: Flops | None = None,
    have: int | None = None,
) -> dict[str, Any]:
    """Plan a job whose rates are known or unknown.

    Args:
        job: Resolved job.
        parts: Loaded networks and data.
        rates: Rates of the machine.
        flops: Operations of the networks. None: they are counted here.
        have: Bytes of memory of each rank. None: those of this machine.

    Returns:
        The plan with keys flops, run, memory_bytes, largest_capacity_images, rates, seconds (None
        with unknown rates), balance_reuse, reuse and suggested.

    Raises:
        UserError: The run does not fit into memory.
    """
    flops = flops or job_flops(parts)
    ring = memory.ring_plan(job.config, parts.origin.image_shape, job.ranks)
    forwards, evaluations = _steps(job, parts, flops)
    images, views = _images(job, parts, ring), job.schedule.num_steps * job.schedule.batch_size
    # The memory of another machine is that of a GPU, where activations are counted as well.
    placed = job if have is None else replace(job, device=torch.device("cuda", 0))
    largest = memory.check(placed, parts, have)
    found: dict[str, Any] = {
        "flops": {
            "denoiser_forward": flops.denoiser,
            "decode": flops.decoder,
            "image": flops.image(evaluations),
            "teachers_forward": flops.teachers,
            "student_forward": flops.student,
            "student_step": flops.student_step,
            "view": flops.view,
        },
        "run": {
            "images": images,
            "forwards_per_image": round(forwards, 2),
            "views": views,
            "steps": job.schedule.num_steps,
            "batch_size": job.schedule.batch_size,
            "evaluations": job.schedule.num_evaluations,
        },
        "memory_bytes": memory.plan(placed, parts),
        "largest_capacity_images": largest,
        "rates": {
            "origin": rates.origin,
            "images_per_s": rates.images_per_s,
            "views_per_s": rates.views_per_s,
        },
        "seconds": None,
        "balance_reuse": None,
        "reuse": [],
        "suggested": {"capacity_images": min(largest, images)},
    }
    if rates.images_per_s and rates.views_per_s:
        times = _times(job, parts, ring, rates)
        found |= times | {"suggested": found["suggested"] | times["suggested"]}
    return found


def memory_lines(counts: dict[str, int], *, num_ranks: int = 1) -> Iterator[str]:
    """Yield the lines of the memory of every part."""
    yield "memory plan:" if num_ranks == 1 else "memory plan of each rank:"
    for name, count in counts.items():
        yield f"  {name}: {count:,} bytes ({count / 2**20:.1f} MiB)"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan, without those of its memory."""
    yield "work per image or view (a multiply-add counts as two operations):"
    for name, count in found["flops"].items():
        yield f"  {name.replace('_', ' ')}: {_gflop(count)}"
    run = found["run"]
    yield (
        f"run: {run['images']:,} images of {run['forwards_per_image']:g} denoiser forwards, "
        f"{run['views']:,} views in {run['steps']:,} steps of {run['batch_size']:,}, "
        f"{run['evaluations']} evaluations"
    )
    rates, suggested = found["rates"], found["suggested"]
    if found["seconds"] is None:
        yield f"rates: {rates['origin']}; dmkd plan CONFIG measures them and predicts the time"
    else:
        yield (
            f"rates ({rates['origin']}): {rates['images_per_s']:,.1f} images/s, "
            f"{rates['views_per_s']:,.1f} views/s"
        )
        yield "time: " + ", ".join(
            f"{name.replace('_', ' ')} {duration(value)}"
            for name, value in found["seconds"].items()
        )
        yield (
            "generation takes as long as training at ring.samples_per_insert="
            f"{found['balance_reuse']:.3g}"
        )
        yield "samples_per_insert      images     generate        train        total"
        for row in found["reuse"]:
            mark = "*" if row["is_set"] else " "
            times = (row[name] for name in ("generate_s", "train_s", "total_s"))
            yield (
                f"{mark}{row['samples_per_insert']:>17g} {row['images']:>11,} "
                + " ".join(f"{duration(value):>12}" for value in times)
            )
        yield (
            f"suggested: ring.samples_per_insert={suggested['samples_per_insert']:g} "
            f"ring.capacity_images={suggested['capacity_images']}, {suggested['ranks']} rank(s)"
        )
    yield f"largest ring.capacity_images that fits: {found['largest_capacity_images']:,}"


def _steps(job: ResolvedJob, parts: Parts, flops: Flops) -> tuple[float, float]:
    """Return forwards of the denoiser per image and their work, means over the phases of the run.

    The work is in evaluations of the denoiser; see `evaluations_per_image`.
    """
    if not isinstance(parts.origin, Denoiser):
        return 0.0, 0.0
    ring = memory.ring_plan(job.config, parts.origin.image_shape, job.ranks)
    forwards = evaluations = 0.0
    phases = (None, *job.config.sampler.phases)
    for phase, (_, weight) in zip(phases, speeds.phase_weights(job, ring), strict=True):
        sampler = make_sampler(job, parts.origin, phase)
        forwards += weight * sampler.forwards_per_image
        evaluations += weight * evaluations_per_image(sampler, flops.denoiser)
    return forwards, evaluations


def _images(job: ResolvedJob, parts: Parts, ring: RingPlan) -> int:
    """Return the number of images that a run generates or reads, on all ranks."""
    ranks = job.ranks.world_size
    needed = ranks * ring.images_for(job.schedule.num_steps * job.schedule.batch_size // ranks)
    if isinstance(parts.origin, OpenSource):
        stored = parts.origin.source.num_images
        # A set that fits into the ring is inserted once.
        return stored if stored <= ranks * ring.num_slots else needed
    return needed


def _times(job: ResolvedJob, parts: Parts, ring: RingPlan, rates: Rates) -> dict[str, Any]:
    """Return the parts of a plan that need rates."""
    assert rates.images_per_s
    assert rates.views_per_s
    views = job.schedule.num_steps * job.schedule.batch_size
    own, train_s = float(ring.samples_per_insert), views / rates.views_per_s
    seconds = {
        "load": rates.load_s,
        "warm_up": rates.warm_up_s,
        "generate": _images(job, parts, ring) / rates.images_per_s,
        "train": train_s,
        "evaluate": rates.evaluate_s * job.schedule.num_evaluations,
        "finish": rates.finish_s,
    }
    total_s, rows = sum(seconds.values()), []
    for reuse in sorted({own, *map(float, REUSES)}):
        other = ring
        if reuse != own:  # error_buffer and max_uses then keep their defaults.
            other = replace(ring, samples_per_insert=reuse, error_buffer=None, max_uses=None)
        count = _images(job, parts, other)
        generate_s = count / rates.images_per_s
        row = {"samples_per_insert": reuse, "is_set": reuse == own, "images": count}
        row |= {"generate_s": generate_s, "train_s": train_s}
        rows.append(row | {"total_s": total_s - seconds["generate"] + generate_s})
    balance = rates.views_per_s / rates.images_per_s
    return {
        "seconds": seconds | {"total": total_s},
        "balance_reuse": balance,
        "reuse": rows,
        "suggested": {
            "samples_per_insert": next((r for r in REUSES if r >= balance), REUSES[-1]),
            "ranks": _ranks(job, total_s),
        },
    }


def _ranks(job: ResolvedJob, total_s: float) -> int:
    """Return the fewest ranks, a power of two, that finish within a day and divide the job."""
    count = 1
    while total_s / count > WITHIN_S and count < MOST_RANKS:
        try:
            memory.ring_plan(job.config, ranks=Ranks(world_size=2 * count))
        except UserError:
            break
        count *= 2
    return count


def _gflop(count: int | None) -> str:
    return "not counted, as it depends on values" if count is None else f"{count / 1e9:,.4g} GFLOP"
