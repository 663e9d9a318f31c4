"""Block caching and guidance intervals: what they save, and what they cost the student.

The embedded many-step denoiser at 8 guided steps. Each arm reuses blocks by another schedule, or
guides other steps; a student of each arm is compared with one of the arm that does neither, paired
by seed. `quality` rows have the arm's images/s, timed in turn with diffusers in bfloat16 and with
the arm that does neither; its arithmetic in forwards of the denoiser; and the Frechet distance of
its first images to as many real test images, in the features of the embedded strong classifier.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.findings import study
from benchmarks.findings.finding_2 import features
from benchmarks.harness import CONFIGS, arguments, time_interleaved
from benchmarks.job.fidelity import frechet
from benchmarks.parts.sampler_models import diffusers_dit, flow_loop, forward_flops
from dmkd_fast import DiffusionSampler, Guide, assets, load_denoiser
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs.build import make_sampler
from dmkd_fast.jobs.parts import prepare

CONFIG = "many_steps.yaml"
CACHE, INTERVAL = "sampler.block_cache", "sampler.guidance_interval"
ARMS: dict[str, list[str]] = {
    "neither": [],
    "every 2": [f"{CACHE}={{every: 2}}"],
    "every 2, all blocks": [f"{CACHE}={{every: 2, blocks: [0, 1]}}"],
    "every 2, from a quarter of the steps on": [f"{CACHE}={{every: 2, steps: [0.25, 1]}}"],
    "every 3": [f"{CACHE}={{every: 3}}"],
    "every 4, all blocks": [f"{CACHE}={{every: 4, blocks: [0, 1]}}"],
    "guidance in [0.25, 1]": [f"{INTERVAL}=[0.25, 1]"],
    "guidance in [0.25, 0.75]": [f"{INTERVAL}=[0.25, 0.75]"],
    "guidance in [0, 0.5]": [f"{INTERVAL}=[0, 0.5]"],
    "every 2, guidance in [0.25, 0.75]": [f"{CACHE}={{every: 2}}", f"{INTERVAL}=[0.25, 0.75]"],
}
GUIDE = "the student's entropy as guide"
COUNT, VIEWS, BATCH, COMPARED = 10_240, 256_000, 128, 2_048


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command line."""
    parser = arguments("block-caching", __doc__ or "", selects=["seeds", "arms"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--n", type=int, default=5, help="timings per arm")
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    cells = study.Cells("block-caching", options)
    sets: dict[str, Callable[[], study.FixedSet]] = {
        arm: partial(study.generated, COUNT, ARMS[arm]) for arm in options.arms
    }
    for arm, images in sets.items():
        for seed in study.student_seeds(options.seeds):
            if not cells.has(arm=arm, seed=seed):
                row = study.train_student(
                    images(), teacher="lenet5", student="lenet5_half", num_views=VIEWS, seed=seed
                )
                cells.add({"arm": arm, "seed": seed}, row)
    # All timings in one piece, at the end: nothing else may run then.
    for arm, images in sets.items():
        if not cells.has(arm=arm, seed="quality"):
            found = costs(ARMS[arm], options.n) | closeness(images())
            cells.add({"arm": arm, "seed": "quality"}, found)
    if set(options.arms) == set(ARMS) and not cells.has(arm=GUIDE, seed="quality"):
        cells.add({"arm": GUIDE, "seed": "quality"}, costs([], options.n, guide=EntropyGuide()))
    cells.finish()


class EntropyGuide:
    """Move images towards a higher entropy of a student, as docs/guides/hooks.md does."""

    is_function_of_id = False

    def __init__(self) -> None:
        _, like = study.load_teacher("lenet5")
        self.student = study.new_student("lenet5_half", 1, like)[0].eval()

    def __call__(self, image_estimate: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        """Return the direction in which the entropy rises."""
        del labels, step
        with torch.enable_grad():
            images = image_estimate.detach().requires_grad_()
            log_p = self.student(images.clamp(-1, 1)).log_softmax(dim=1)
            (gradient,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), images)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-6)
        direction: Tensor = gradient / length[:, None, None, None]
        return direction


def costs(overrides: list[str], n: int, *, guide: Guide | None = None) -> dict[str, Any]:
    """Return images/s of an arm beside diffusers and the arm without changes, and its forwards."""
    labels = torch.arange(BATCH) % 10
    sampler, whole = _sampler(overrides, guide), _sampler([])
    steps, scale = sampler.steps.count, sampler.guidance.scale
    folder: Path = assets.resolve("embedded:fashion_mnist/denoiser")
    module = diffusers_dit(folder).to(torch.bfloat16)
    timings = time_interleaved(
        {
            "diffusers": partial(flow_loop, module, torch.bfloat16, labels, steps, scale),
            "whole": partial(_sample, whole),
            "arm": partial(_sample, sampler),
        },
        n=n,
        warmup=1,
    )
    median = {name: timing["median_ms"] for name, timing in timings.items()}
    with FlopCounterMode(display=False) as counter:
        _sample(sampler)
    once = forward_flops(load_denoiser(folder, torch.device("cpu")), torch.device("cpu"))
    return {
        "images_per_s": round(1e3 * BATCH / median["arm"], 1),
        "times_neither": round(median["whole"] / median["arm"], 3),
        "times_diffusers": round(median["diffusers"] / median["arm"], 3),
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "forwards": round(counter.get_total_flops() / BATCH / once, 2),
        "num_steps": steps,
        "n": n,
    }


def closeness(images: study.FixedSet) -> dict[str, Any]:
    """Return the Frechet distance of the first images to as many real test images."""
    with torch.inference_mode():
        made, real = (
            features(part[:COMPARED])[0] for part in (images.images, study.test_images().images)
        )
    return {
        "frechet": round(frechet(made, real), 4),
        "compared": min(COMPARED, len(images.images)),
        "cpu_s": round(images.cpu_s, 1),
    }


def _sampler(overrides: list[str], guide: Guide | None = None) -> DiffusionSampler:
    changes = [*overrides, f"sampler.micro_batch_images={BATCH}"]
    job, parts = prepare(load_config(DistillConfig, CONFIGS / CONFIG, changes))
    assert isinstance(parts.origin, Denoiser)
    return make_sampler(job, parts.origin, guide=guide)


def _sample(sampler: DiffusionSampler) -> None:
    ids, shape = torch.arange(BATCH), sampler.denoiser.image_shape
    sampler.sample(ids, ids % 10, out=torch.empty(BATCH, *shape, dtype=torch.uint8))
