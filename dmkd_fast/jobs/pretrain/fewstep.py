"""Train a few-step denoiser from a many-step one: `dmkd pretrain fewstep`.

The few-step denoiser learns to end each step where the guided many-step sampler ends (Meng et al.,
arXiv 2210.03142), so guidance becomes part of the result. It predicts what the given model does;
for a flow model, that is the average velocity over the step (Geng et al., MeanFlow, arXiv
2505.13447). Errors of predictions are weighted by what they change in the state after the step.

Shapes: batch B, K steps of the few-step denoiser, c channels, H x W pixels.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.assets import resolve as resolve_path
from dmkd_fast.config.jobs import PretrainFewstepConfig
from dmkd_fast.data.class_names import read_class_names, write_class_names
from dmkd_fast.data.listing import CLASS_NAMES
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.denoisers.families.class_unet import ClassUNet
from dmkd_fast.denoisers.loading import load_denoiser
from dmkd_fast.denoisers.trainable import save_denoiser, share_embedder
from dmkd_fast.denoisers.wrappers import PixelDiT
from dmkd_fast.jobs import memory, resolve
from dmkd_fast.jobs.pretrain import loop
from dmkd_fast.jobs.pretrain.denoiser import training_attention
from dmkd_fast.jobs.report import images as report_images
from dmkd_fast.runtime.device import InFlight, available_bytes
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.sampling.arguments import Guidance, Steps
from dmkd_fast.sampling.noise_levels import (
    SPACINGS,
    VARIANCE_PRESERVING,
    Scheduler,
    Solver,
    choose_solver,
)
from dmkd_fast.sampling.sampler import DiffusionSampler
from dmkd_fast.sampling.solvers import solver_table

# First ids of the trajectories that train and that measure the result. The images of a job with the
# same seed count from 0, so that the result is not used on the noise that it was trained on.
FIRST_ID, HELD_OUT_ID = 2**41, 2**40
# What a scheduler_config.json says about how a model was trained.
TRAINED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


@loop.less_memory
def pretrain_fewstep(
    config: PretrainFewstepConfig, *, resume: bool = False, show: bool = True
) -> dict[str, Any]:
    """Train a denoiser to cross each of K intervals in one evaluation; save it as `model`.

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
    if (ended := loop.finished(config, resume=resume)) is not None:
        return ended
    job = loop.prepare(config, resume=resume, show=show)
    config, device = job.config, job.device
    given = resolve_path(config.denoiser.path, config.denoiser.revision)
    null_class = config.denoiser.null_class
    start = load_denoiser(given, device, null_class=null_class)
    if not isinstance(start.module, LeanDiT | PixelDiT | ClassUNet):
        got, fix = f"a {type(start.module).__name__}", "use a class-conditional model"
        raise invalid("denoiser.path", got, "a DiT or a class-conditional UNet", fix)
    start = replace(start, scheduler=_many_steps(start.scheduler, config.sampler.solver))
    scheduler = _few_steps(start.scheduler, config)
    pool = Pool(start, scheduler, job)
    model: Any = load_denoiser(given, device, lean=False, null_class=null_class).module
    if isinstance(start.module, LeanDiT):  # a PixelDiT has blocks with embedders of their own
        share_embedder(model.dit)
    model.requires_grad_(True)
    forward = job.compiled(model)

    def loss_of(indices: Tensor, uses: Tensor) -> Tensor:
        del uses
        states, timesteps, wanted, labels, weights = pool.intervals(indices)
        with training_attention(device), job.autocast():
            predicted = forward(states, timesteps, labels)
        width = wanted.shape[1]  # a model with learned variances predicts further channels
        squares = (predicted[:, :width].float() - wanted).square()
        loss: Tensor = (weights * squares).mean()
        return loss

    with loop.opened(config, resume=resume) as folder:
        average, facts = loop.train(
            job,
            model,
            loss_of,
            config.pool_images * config.num_steps,
            folder,
            before_step=lambda uses: pool.make(int(uses[0]) // config.reuse),
        )
        with loop.results(folder) as target:
            _save(average.module, scheduler, target)
            if start.decoder is not None:
                shutil.copytree(given / "vae", target / "vae")
            if names := read_class_names(given / CLASS_NAMES, must_exist=False):
                write_class_names(target / CLASS_NAMES, names)
            facts |= _compare(target, pool, start, job)
            loop.write_card(
                target,
                f"{config.name}: {config.num_steps}-step denoiser",
                "pretrain fewstep CONFIG",
                config,
                facts,
                source=f"trajectories of `{config.denoiser.path}`",
            )
    return job.finish(facts)


def _many_steps(scheduler: Scheduler, solver: Solver) -> Scheduler:
    """Return the scheduler of the trajectories, whose levels contain those of fewer steps.

    Raises:
        UserError: The scheduler is not supported, or the solver adds noise.
    """
    chosen = choose_solver(scheduler, solver)
    is_flow = str(scheduler["_class_name"]) not in VARIANCE_PRESERVING
    # Euler steps of the others have states of another scale.
    if chosen not in (("euler", "dpm++2m") if is_flow else ("ddim", "dpm++2m")):
        fix = "set sampler.solver=dpm++2m, or use another model"
        raise invalid("sampler.solver", chosen, "a solver without fresh noise", fix)
    if is_flow:
        return scheduler
    spacing = {"timestep_spacing": "trailing", "steps_offset": 0}
    return {**scheduler, **spacing, **dict.fromkeys(SPACINGS, False)}


def _few_steps(scheduler: Scheduler, config: PretrainFewstepConfig) -> Scheduler:
    """Return the scheduler of the result; diffusers' one of its class makes the same steps."""
    if str(scheduler["_class_name"]) in VARIANCE_PRESERVING:
        trained = {key: scheduler[key] for key in TRAINED if key in scheduler}
        scheduler = {
            "_class_name": "DPMSolverMultistepScheduler",
            **trained,
            "solver_order": 1,
            "timestep_spacing": "trailing",
        }
    return {
        **scheduler,
        "distilled_steps": config.num_steps,
        "distilled_guidance_scale": config.sampler.scale,
    }


def _save(model: Any, scheduler: Scheduler, folder: Path) -> None:
    """Write a denoiser for diffusers to load."""
    if isinstance(model, PixelDiT):
        save_denoiser(model.dit, scheduler, folder)
        return
    model.unet.save_pretrained(folder / "unet")
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")


class Pool:
    """Guided trajectories of the teacher, kept at the K + 1 noise levels of the few-step model."""

    def __init__(
        self, start: Denoiser, few: Scheduler, job: loop.PretrainJob[PretrainFewstepConfig]
    ) -> None:
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
        table = solver_table(few, Steps(count=config.num_steps), device)
        self._timesteps = table.column("timestep")
        taken = self.sampler.table.column("timestep")[:: self.stride]
        if not torch.allclose(taken, self._timesteps, rtol=1e-5, atol=1e-3):
            got = f"{config.sampler.steps}"
            expected = f"timesteps that contain those of num_steps={config.num_steps}"
            fix = "use a divisor of num_train_timesteps for num_steps"
            raise invalid("sampler.num_steps", got, expected, fix)
        # A step of first order is x_after = keep * x + gain * prediction.
        a, b0, skip, out = (table.column(name) for name in ("a", "b0", "skip", "out"))
        self._keep, self._gain = (v[:, None, None, None] for v in (a + b0 * skip, b0 * out))
        self._weights = self._gain.square() / self._gain.square().mean()
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
        first = FIRST_ID + number * self.size
        ids = first + torch.arange(self.size, device=self.device)
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

    def intervals(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Look up states, timesteps, wanted predictions, labels and weights of examples.

        Args:
            indices: Numbers (B,) of the examples; number i is interval i % K of trajectory i // K.
        """
        k, place = indices % self.num_steps, indices // self.num_steps
        states, after = self._states[k, place].float(), self._states[k + 1, place].float()
        wanted = (after - self._keep[k] * states) / self._gain[k]
        return states, self._timesteps[k], wanted, self._labels[place], self._weights[k]


@torch.inference_mode()
def _compare(
    folder: Path, pool: Pool, start: Denoiser, job: loop.PretrainJob[PretrainFewstepConfig]
) -> dict[str, Any]:
    """Compare the saved few-step model with its teacher on new noise; draw samples.png."""
    config, device = job.config, job.device
    loaded = load_denoiser(folder, device, null_class=config.denoiser.null_class)
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
    shown = report_images.evenly(start.num_classes, report_images.MOST_ROWS)
    classes = torch.tensor(shown, device=device).repeat_interleave(8)
    out = torch.empty((len(classes), *start.image_shape), dtype=torch.uint8, device=device)
    made.sample(HELD_OUT_ID + torch.arange(len(classes), device=device), classes, out=out)
    names = read_class_names(folder / CLASS_NAMES, must_exist=False)
    rows = [names[label] if label < len(names) else str(label) for label in shown]
    report_images.grid(out.cpu().unflatten(0, (-1, 8)), rows, folder / "samples.png")
    return facts
