"""Check this machine and a job on it; `dmkd doctor`. Each check is one line."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.config.overrides import Overrides
from dmkd_fast.denoisers import attention
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.jobs import memory
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.images import Priors
from dmkd_fast.jobs.inspect import machine, networks
from dmkd_fast.jobs.inspect.findings import Finding, ok, wrong
from dmkd_fast.jobs.inspect.rates import fill
from dmkd_fast.jobs.inspect.recorder import Recorder, recorded_reads
from dmkd_fast.jobs.parts import Parts, prepare
from dmkd_fast.jobs.resolve import ResolvedJob
from dmkd_fast.runtime import container
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.sampling.generated import GeneratedImages
from dmkd_fast.training.distiller import Distiller

# Images of so many classes are generated, and at least so many of each.
MOST_CLASSES, LEAST_IMAGES = 20, 8
# Checkpoints on disk at a time, the one being written included.
CHECKPOINTS = 3
MOST_BLANK = 0.1


def examine(
    config: str | Path | DistillConfig | None = None, overrides: Overrides = ()
) -> Iterator[Finding]:
    """Yield the findings about this machine and, with a config, about the job.

    Args:
        config: Path of a YAML file, or a config; None: the machine alone.
        overrides: Settings to change, as `load_config` takes them.

    Raises:
        UserError: The config is wrong.
    """
    loaded = None if config is None else load_config(DistillConfig, config, overrides)
    yield from machine.examine(Path())
    if loaded is None:
        return
    try:
        job, parts = prepare(loaded)
        memory.check(job, parts)
        with tempfile.TemporaryDirectory(prefix="dmkd-") as folder:
            # Nothing is written to the run directory.
            elsewhere = job.config.model_copy(update={"run_dir": folder})
            distiller = build(replace(job, config=elsewhere), parts, show=False)
            yield from examine_job(job, parts, distiller)
    except UserError as error:
        yield wrong("job", str(error), "it cannot run", "do what the message says")


def examine_job(job: ResolvedJob, parts: Parts, distiller: Distiller) -> Iterator[Finding]:
    """Yield the findings about a job that is loaded and assembled.

    Args:
        job: Resolved job.
        parts: Loaded networks and data.
        distiller: The assembled job, of which some steps are taken.
    """
    yield ok("settings", f"{job.device.type}, {job.config.dtype}, fits into memory")
    yield machine.disk(Path(job.config.run_dir), disk_bytes(job, parts), name="run_dir")
    yield threads(job)
    weights = networks.weights(parts)
    yield weights
    if isinstance(parts.origin, Denoiser):
        yield attention_kernel(job, parts.origin)
    if not weights.is_ok:
        return
    images, labels = labeled_images(distiller)
    yield broken(distiller, images)
    yield from training_step(distiller, images)
    yield compiled(job)
    if not isinstance(parts.origin, Priors):  # They have no classes.
        yield from networks.understanding(parts, images, labels)
    yield networks.real_images(parts)


def summary(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings for JSON."""
    return {
        "ok": all(finding.is_ok for finding in findings),
        "findings": [
            {"name": f.name, "ok": f.is_ok, "what": f.what, "means": f.means, "do": f.do}
            for f in findings
        ],
    }


def disk_bytes(job: ResolvedJob, parts: Parts) -> int:
    """Return the bytes that a run writes: checkpoints and the images of the ring."""
    counts = memory.plan(job, parts)
    ring = sum(count for name, count in counts.items() if name.startswith("ring "))
    state = counts["student, gradients, optimizer, average"]
    return CHECKPOINTS * state + 2 * ring + 2**26


def threads(job: ResolvedJob) -> Finding:
    """Check that a job has no more threads than CPUs."""
    count, usable = job.config.num_threads, container.num_cpus()
    if count > usable:
        means = "threads wait for each other"
        return wrong("threads", f"{count} on {usable} CPUs", means, "set num_threads=0")
    return ok("threads", f"{count} on {usable} CPUs")


@torch.no_grad()
def attention_kernel(job: ResolvedJob, denoiser: Denoiser) -> Finding:
    """Check that the denoiser uses the fastest kind of attention for its shape."""
    device, module = job.device, denoiser.module
    latents = torch.zeros(4, *denoiser.latent_shape, device=device)
    inputs = [torch.zeros(4, device=device), torch.zeros(4, dtype=torch.int64, device=device)]
    if denoiser.takes_guidance:
        inputs.append(torch.ones(4, device=device))
    module.to(device=device, dtype=job.dtype)
    with Recorder() as recorder:
        module(latents.to(job.dtype), *inputs)
    kinds = ("short_attention", "xformers_attention", "scaled_dot_product")
    used = [name for name in sorted(recorder.names) if any(kind in name for kind in kinds)]
    text = ", ".join(used) or "none of the fused kinds"
    if isinstance(module, LeanDiT):
        text += f" ({module.attention_operator(device, job.dtype)})"
    means = "images are generated more slowly than they could be"
    if isinstance(module, LeanDiT) and device.type == "cpu":
        most = attention.MOST_SHORT_TOKENS[torch.cpu._is_amx_tile_supported()]
        has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        takes = module.num_tokens <= most and module.head_dim % 2 == 0
        if has_avx512 and takes and "short_attention" not in used:
            do = "set sampler.attention=auto, and see the line on the extension"
            return wrong("attention", f"{text} instead of short_attention", means, do)
    elif device.type == "cuda" and not used:
        return wrong("attention", text, means, "install xformers, or set dtype=float16")
    return ok("attention", text)


def labeled_images(distiller: Distiller) -> tuple[Tensor, Tensor]:
    """Return images (B, c, H, W) uint8 of the run and their classes (B,).

    Generated images are of up to 20 classes, at least 8 of each.
    """
    ring, stream = distiller.ring, distiller.images
    size, device = ring.block_images, distiller.device
    images, labels = [], []
    if isinstance(stream, GeneratedImages):
        sampler = stream.samplers[0][1]
        count = sampler.denoiser.num_classes
        chosen = torch.arange(0, count, max(1, -(-count // MOST_CLASSES)), device=device)
        for first in range(0, LEAST_IMAGES * len(chosen), size):
            ids = torch.arange(first, first + size, device=device)
            labels.append(chosen[ids % len(chosen)])
            images.append(torch.empty_like(ring.images[:size]))
            sampler.sample(ids, labels[-1], out=images[-1])
    else:
        ids, wanted = stream.next_block(size)
        labels.append(wanted.to(device))
        images.append(torch.empty_like(ring.images[:size]))
        stream.write(ids, wanted, images[-1], progress=0.0)
    return torch.cat(images), torch.cat(labels)


def broken(distiller: Distiller, images: Tensor) -> Finding:
    """Check that images are finite and not blank."""
    counts = distiller.images.counts(distiller.device)
    number = int(counts.get("broken_images", torch.zeros(())))
    blank = (images.flatten(1).amax(1) == images.flatten(1).amin(1)).float().mean().item()
    if number:
        return wrong(
            "images",
            f"{number} of {len(images)} have values that are not finite",
            "a run stops at more than 1 %",
            "set dtype=bfloat16 or dtype=float32",
        )
    if blank > MOST_BLANK:
        means = "the student learns nothing from them"
        return wrong("images", f"{blank:.0%} are of one color", means, "look at the denoiser")
    return ok("images", f"{len(images)} finite, {blank:.0%} of one color")


def training_step(distiller: Distiller, images: Tensor) -> Iterator[Finding]:
    """Take two steps; check the loss, waits for the device, and that teachers stay the same."""
    made = images[: distiller.ring.block_images]
    teachers = [distiller.targets.teachers, distiller.targets.networks]
    before = networks.fingerprint(teachers)
    fill(distiller, made)
    distiller.train_step()  # The first step sets up the optimizer.
    fill(distiller, made)
    with recorded_reads(distiller.device) as reads:
        loss = distiller.train_step()
    reads = [*dict.fromkeys(reads)]
    yield networks.frozen(teachers, before)
    skipped = int(distiller.student.counts()["skipped_steps"])
    if skipped or not loss.isfinite():
        means = "steps that are not finite change nothing"
        do = "lower optim.lr, or set dtype=float32"
        yield wrong("loss", f"{loss.item():.4g}, {skipped} of 2 steps skipped", means, do)
    else:
        yield ok("loss", f"{loss.item():.4g}")
    if reads:
        yield wrong(
            "step",
            f"reads values of the device at {', '.join(reads[:3])}",
            "the host waits for the device in every step, so a GPU is idle meanwhile",
            "replace .item(), .cpu(), bool(tensor) and if tensor: by tensor operations",
        )
    else:
        yield ok("step", "no read of device values")


def compiled(job: ResolvedJob) -> Finding:
    """Check that torch.compile ran where the job compiles, without graph breaks."""
    wanted = [
        name
        for name, is_on in (("sampler", job.compile_sampler), ("student", job.compile_student))
        if is_on
    ]
    if not wanted:
        return ok("compile", "off")
    from torch._dynamo.utils import counters

    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    text = f"{', '.join(wanted)}: {graphs} graphs, {breaks} graph breaks"
    if graphs == 0 or breaks:
        means = "parts of the networks run uncompiled and more slowly"
        return wrong("compile", text, means, "look at TORCH_LOGS=graph_breaks")
    return ok("compile", text)
