"""Train a few-step denoiser from a many-step one: `dmkd pretrain fewstep`.

The few-step denoiser learns the average velocity over an interval (Geng et al., MeanFlow, arXiv
2505.13447). Its targets are taken from trajectories of the guided many-step sampler (as in Meng et
al., arXiv 2210.03142), so guidance becomes part of the result.

Shapes: batch B, K steps of the few-step denoiser, c channels, H x W pixels.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmkd_fast.assets import resolve as resolve_path
from dmkd_fast.config.jobs import PretrainFewstepConfig
from dmkd_fast.data.class_names import read_class_names, write_class_names
from dmkd_fast.data.listing import CLASS_NAMES
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.denoisers.trainable import save_denoiser, share_embedder
from dmkd_fast.denoisers.wrappers import PixelDiT
from dmkd_fast.jobs import memory, resolve, run_dir
from dmkd_fast.jobs.pretrain import loop
from dmkd_fast.jobs.pretrain.denoiser import FLOW, training_attention
from dmkd_fast.jobs.report import images as report_images
from dmkd_fast.runtime.device import InFlight, available_bytes
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.sampling.arguments import Guidance, Steps
from dmkd_fast.sampling.noise_levels import flow_sigmas
from dmkd_fast.sampling.sampler import DiffusionSampler

# First id of the trajectories that measure the result; training uses lower ids.
HELD_OUT_ID = 2**40


@loop.less_memory
def pretrain_fewstep(
    config: PretrainFewstepConfig, *, resume: bool = False, show: bool = True
) -> dict[str, Any]:
    """Train a flow denoiser to cross each of K intervals in one evaluation; save it as `model`.

    No images are needed: the training data are the given denoiser's own guided trajectories, which
    start from noise.

    Args:
        config: Settings of the job.
        resume: Whether to continue from the newest checkpoint.
        show: Whether to show progress.

    Returns:
        The figures that `loop.train` returns, and two root mean square differences to the teacher's
        images from the same noise, in units of [-1, 1] pixels or of latents: rms_to_teacher of the
        trained denoiser, and rms_without_training of the teacher's own K guided steps.
    """
    job = loop.prepare(config, resume=resume, show=show)
    if (ended := job.finished()) is not None:
        return ended
    config, device = job.config, job.device
    given = resolve_path(config.denoiser.path, config.denoiser.revision)
    start = load_denoiser(given, device, null_class=config.denoiser.null_class)
    if start.scheduler.get("_class_name") != FLOW["_class_name"]:
        got = f"a {start.scheduler.get('_class_name')}"
        expected = f"a flow model ({FLOW['_class_name']})"
        raise invalid("denoiser.path", got, expected, "use one from `dmkd pretrain denoiser`")
    if not isinstance(start.module, LeanDiT | PixelDiT):
        got = f"a {type(start.module).__name__}"
        raise invalid("denoiser.path", got, "a DiT", "use one from `dmkd pretrain denoiser`")
    pool = Pool(start, job)
    model: Any = load_denoiser(given, device, lean=False).module
    share_embedder(model.dit)
    model.requires_grad_(True)
    forward = job.compiled(model)

    def loss_of(indices: Tensor, uses: Tensor) -> Tensor:
        del uses
        states, timesteps, velocity, labels = pool.intervals(indices)
        with training_attention(device), job.autocast():
            predicted = forward(states, timesteps, labels)
        return nn.functional.mse_loss(predicted.float(), velocity)

    with run_dir.opened(config, resume=resume) as folder:
        average, facts = loop.train(
            job,
            model,
            loss_of,
            config.pool_images * config.num_steps,
            folder,
            before_step=lambda uses: pool.make(int(uses[0]) // config.reuse),
        )
        scheduler = {
            **start.scheduler,
            "distilled_steps": config.num_steps,
            "distilled_guidance_scale": config.sampler.scale,
        }
        with loop.results(folder) as target:
            save_denoiser(average.module.dit, scheduler, target)
            if start.decoder is not None:
                shutil.copytree(given / "vae", target / "vae")
            if names := read_class_names(given / CLASS_NAMES, must_exist=False):
                write_class_names(target / CLASS_NAMES, names)
            facts |= _compare(target, pool, start, job)
            loop.write_card(
                target,
                f"{config.name}: {config.num_steps}-step DiT",
                "pretrain fewstep CONFIG",
                config,
                facts,
                source=f"trajectories of `{config.denoiser.path}`",
            )
    return job.finish(facts)


class Pool:
    """Guided trajectories of the teacher, kept at the K + 1 noise levels of the few-step model."""

    def __init__(self, start: Denoiser, job: loop.PretrainJob[PretrainFewstepConfig]) -> None:
        config, device, self.display = job.config, job.device, job.display
        self.size, self.num_steps, self.device = config.pool_images, config.num_steps, device
        self.num_classes = start.num_classes
        self.stride = config.sampler.steps // config.num_steps
        shape = start.latent_shape
        self.sampler = DiffusionSampler(
            start,
            Steps(count=config.sampler.steps, solver=config.sampler.solver),
            Guidance(scale=config.sampler.scale),
            micro_batch_images=config.sampler.micro_batch_images,
            dtype=job.dtype,
            device=device,
            seed=config.seed,
            compile=resolve.compiles(config.sampler.compile, device, name="sampler.compile"),
        )
        states = {"pool_images": 2 * (config.num_steps + 1) * self.size * math.prod(shape)}
        memory.check_fits(states, available_bytes(device))
        shift = float(start.scheduler.get("shift", 1.0))
        self.sigmas = flow_sigmas(config.sampler.steps, shift)[:: self.stride].float()
        self.sigmas = self.sigmas.to(device)
        self._states = torch.empty(config.num_steps + 1, self.size, *shape, dtype=torch.float16)
        self._states = self._states.to(device)
        self._labels = torch.empty(self.size, dtype=torch.int64, device=device)
        self._number: int | None = None
        self._in_flight = InFlight(device)

    def make(self, number: int) -> None:
        """Generate the trajectories of pool `number` unless the pool already holds them."""
        if number == self._number:
            return
        self._number = None
        ids = number * self.size + torch.arange(self.size, device=self.device)
        self._labels = ids % self.num_classes
        size = self.sampler.micro_batch_images
        with self.display.phase("generating", self.size, "images") as phase:
            for first in range(0, self.size, size):
                rows = slice(first, first + size)
                with self._in_flight.piece():
                    self._states[:, rows] = self.trajectories(ids[rows], self._labels[rows])
                phase.advance(len(ids[rows]))
        self._number = number

    def trajectories(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the states at the K + 1 noise levels, (K + 1, B, c, H, W) float32.

        Args:
            ids: Image ids (B,) int64, which fix the noise.
            labels: Classes (B,) int64.
        """
        return self.sampler.trajectory(ids, labels)[:: self.stride]

    def intervals(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Look up examples: states, timesteps, average velocities over the interval, labels.

        Args:
            indices: Numbers (B,) of the examples; number i is interval i % K of trajectory i // K.
        """
        k, place = indices % self.num_steps, indices // self.num_steps
        states, after = self._states[k, place].float(), self._states[k + 1, place].float()
        width = (self.sigmas[k + 1] - self.sigmas[k])[:, None, None, None]
        return states, self.sigmas[k] * 1000, (after - states) / width, self._labels[place]


@torch.inference_mode()
def _compare(
    folder: Path, pool: Pool, start: Denoiser, job: loop.PretrainJob[PretrainFewstepConfig]
) -> dict[str, Any]:
    """Compare the saved few-step model with its teacher on new noise; draw samples.png."""
    config, device = job.config, job.device
    loaded = load_denoiser(folder, device)
    size = pool.sampler.micro_batch_images
    ids = HELD_OUT_ID + torch.arange(size, device=device)
    labels = ids % start.num_classes
    largest = 1.0 if start.decoder is None else math.inf  # latents have no bounds
    wanted = pool.trajectories(ids, labels)[-1].clamp(-largest, largest)
    shared: dict[str, Any] = {"micro_batch_images": size, "device": device, "seed": config.seed}
    made = DiffusionSampler(loaded, Steps(count=config.num_steps), **shared)
    untrained = DiffusionSampler(
        start,
        Steps(count=config.num_steps, solver=config.sampler.solver),
        Guidance(scale=config.sampler.scale),
        **shared,
    )
    facts = {}
    compared = (("rms_to_teacher", made), ("rms_without_training", untrained))
    for name, sampler in job.display.track(
        compared, "comparing", len(compared), "samplers", size=lambda _: 1
    ):
        got = sampler.trajectory(ids, labels)[-1].clamp(-largest, largest)
        facts[name] = round((got - wanted).square().mean().sqrt().item(), 4)
    classes = torch.arange(start.num_classes, device=device).repeat_interleave(8)
    out = torch.empty((len(classes), *start.image_shape), dtype=torch.uint8, device=device)
    made.sample(HELD_OUT_ID + torch.arange(len(classes), device=device), classes, out=out)
    names = read_class_names(folder / CLASS_NAMES, must_exist=False)
    names = names or tuple(str(label) for label in range(start.num_classes))
    report_images.grid(out.cpu().unflatten(0, (-1, 8)), names, folder / "samples.png")
    return facts
