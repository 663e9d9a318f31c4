"""Count the floating-point operations of a job's networks, on the meta device.

A multiply-add counts as two operations. Matrix products, convolutions and attention are counted,
which is nearly all of the work. Nothing is computed, so counting takes no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dmkd_fast.classifiers.ensemble import Teacher
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs.memory import on_meta
from dmkd_fast.jobs.parts import Parts
from dmkd_fast.sampling.sampler import DiffusionSampler

# Batch norms in training mode need several images.
IMAGES = 2


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of each network for one image or view; None where a network cannot be counted."""

    denoiser: int | None
    """One evaluation of the denoiser; 0 without one."""
    decoder: int | None
    """Decoding of one image; 0 for pixel models and without a denoiser."""
    teachers: int | None
    """Forward pass of all teachers, each weighted with its part of the run."""
    student: int | None
    """Forward pass of the student."""
    student_step: int | None
    """Forward and backward pass of the student."""

    @property
    def view(self) -> int | None:
        """Operations of one view: the teachers and the step of the student."""
        return _sum(self.teachers, self.student_step)

    def image(self, evaluations: float) -> int | None:
        """Return the operations of one generated image.

        Args:
            evaluations: Work of its steps, in evaluations of the denoiser.
        """
        denoiser = None if self.denoiser is None else round(evaluations * self.denoiser)
        return _sum(denoiser, self.decoder)


def job_flops(parts: Parts) -> Flops:
    """Count the operations of all networks of a job."""
    denoiser: int | None = 0
    decoder: int | None = 0
    if isinstance(parts.origin, Denoiser):
        denoiser, decoder = generator_flops(parts.origin)
    spec = parts.student_spec
    views = (torch.empty(IMAGES, spec.in_chans, spec.input_size, spec.input_size),)
    return Flops(
        denoiser=denoiser,
        decoder=decoder,
        # Stored logits are read instead of computed.
        teachers=_sum(
            *(_teacher_flops(m) for m in parts.teachers.together.members if parts.stored is None)
        ),
        student=_per_image(parts.student, views),
        student_step=_per_image(parts.student, views, backward=True),
    )


def evaluations_per_image(sampler: DiffusionSampler, one: int | None) -> float:
    """Return the work of a sampler's steps for one image, in evaluations of its denoiser.

    Steps that reuse blocks, or that a weaker denoiser guides, are less than their forwards.

    Args:
        sampler: Sampler that has made no image yet.
        one: Operations of one evaluation. None or 0: forwards are counted in their place.
    """
    denoiser = sampler.denoiser
    # In the order of the steps, since one that reuses blocks takes the sum of an earlier one.
    others = dict.fromkeys(m for m, _ in sampler.calls if m is not denoiser.module)
    works = {module: _per_image(module, _inputs(denoiser)) for module in others}
    if not one or None in works.values():
        return float(sampler.forwards_per_image)
    works[denoiser.module] = one
    return sum(rows * (works[module] or 0) for module, rows in sampler.calls) / one


def generator_flops(denoiser: Denoiser) -> tuple[int | None, int | None]:
    """Count one evaluation of a denoiser, and the decoding of one image."""
    inputs, decoder = _inputs(denoiser), denoiser.decoder
    decode = 0 if decoder is None else _per_image(decoder, inputs[:1])
    return _per_image(denoiser.module, inputs), decode


def _inputs(denoiser: Denoiser) -> tuple[Tensor, ...]:
    """Return arguments of a denoiser's module, for `IMAGES` rows."""
    # A text-to-image model is loaded in the dtype of the job, and a sampler casts any other.
    dtype = next((p.dtype for p in denoiser.module.parameters()), torch.float32)
    latents = torch.empty(IMAGES, *denoiser.latent_shape, dtype=dtype)
    one = torch.zeros(IMAGES)
    return latents, one, one.long(), *([one] if denoiser.takes_guidance else [])


def count(model: nn.Module, inputs: Sequence[Tensor], *, backward: bool = False) -> int | None:
    """Count the operations of one call of a network on a batch.

    Args:
        model: Network; its device, weights and buffers are left alone.
        inputs: Arguments of the call, of which only shapes and dtypes matter.
        backward: Whether to count the backward pass as well.

    Returns:
        The number of operations, or None for a network whose control flow depends on values,
        which cannot run on the meta device.
    """
    weights, arguments = on_meta(model), tuple(value.to("meta") for value in inputs)
    # A network of the user can raise any error on the meta device.
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            result: Any = torch.func.functional_call(model, weights, arguments)
            if backward:
                result.sum().backward()
        return int(counter.get_total_flops())
    return None


def _per_image(model: nn.Module, inputs: Sequence[Tensor], *, backward: bool = False) -> int | None:
    total = count(model, inputs, backward=backward)
    return None if total is None else total // IMAGES


def _teacher_flops(member: Teacher) -> int | None:
    spec = member.input
    views = torch.empty(IMAGES, spec.num_channels, spec.size, spec.size)
    found = _per_image(member.module, (views,))
    return None if found is None else round((member.stop - member.start) * found)


def _sum(*counts: int | None) -> int | None:
    known = [number for number in counts if number is not None]
    return sum(known) if len(known) == len(counts) else None
