"""Replace every "auto" of a config by a value for this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dmkd_fast.config.generator import SamplerConfig
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.denoisers.dit import LeanDiT
from dmkd_fast.jobs import networks, run_dir
from dmkd_fast.jobs.images import OpenSource, Origin, Priors, check_count, named_as_settings
from dmkd_fast.jobs.stored_logits import with_teachers_of_source
from dmkd_fast.runtime.device import (
    can_compile,
    resolve_device,
    resolve_dtype,
    set_num_threads,
    set_repeatable,
)
from dmkd_fast.runtime.distributed import ALONE, Ranks, use_device
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.sampling.noise_levels import choose_solver
from dmkd_fast.training.schedule import Schedule

# First compute capability with products of 8-bit floating-point numbers.
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, kw_only=True)
class ResolvedJob:
    """A config in which no "auto" is left, and what follows from it on this machine."""

    config: DistillConfig
    """Config that is saved with the run. `resolve_images` replaces the last "auto"s in it."""
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of all networks."""
    compile_sampler: bool
    compile_student: bool
    schedule: Schedule
    """Length, batch size (of all ranks together) and optimizer of the run."""
    ranks: Ranks = ALONE


def resolve(config: DistillConfig, ranks: Ranks = ALONE) -> ResolvedJob:
    """Replace every "auto" that depends on the machine.

    Raises:
        UserError: The machine does not have what the config asks for.
    """
    use_device(ranks, config.device)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if device.type == "cuda":
        set_repeatable(config.repeatable)
    if config.source is not None and config.source.follow and ranks.world_size > 1:
        got = f"true with {ranks.world_size} ranks"
        expected = "false, as each would find new shards at another time"
        raise invalid("source.follow", got, expected, "let dmkd generate finish first")
    config = with_teachers_of_source(config)
    first, *more = (networks.pin(teacher) for teacher in config.teachers.values())
    if config.ring.overlap and device.type != "cuda":
        got = f"true with device {device.type}, which has one stream"
        raise invalid("ring.overlap", got, "false", "set ring.overlap=false")
    if config.sampler.experimental_fp8:
        check_fp8(device, dtype)
    compile_sampler = compiles(config.sampler.compile, device, name="sampler.compile")
    compile_student = compiles(config.train.compile, device)
    changes: dict[str, Any] = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "num_threads": set_num_threads(config.num_threads, num_processes=ranks.local_world_size),
        "train": {"compile": compile_student},
        "teacher": first,
        "more_teachers": more,
    }
    if config.source is None:
        changes["sampler"] = {"compile": compile_sampler}
    return ResolvedJob(
        config=load_config(DistillConfig, run_dir.name_new(config), changes),
        device=device,
        dtype=dtype,
        compile_sampler=compile_sampler,
        compile_student=compile_student,
        schedule=Schedule(
            **config.optim.model_dump(),
            **config.train.model_dump(exclude={"compile"}),
            num_evaluations=config.eval.num_points,
        ),
        ranks=ranks,
    )


def resolve_images(job: ResolvedJob, images: Origin) -> ResolvedJob:
    """Replace every "auto" that depends on the loaded denoiser or the opened directory.

    Raises:
        UserError: The solver or the kind of attention does not work with the denoiser, or the
            directory has too few images for the ring.
    """
    config = job.config
    if isinstance(images, OpenSource):
        check_count(config, images.source.num_images, job.ranks.world_size)
        changes: dict[str, Any] = {"source": {"kind": images.kind}}
    elif isinstance(images, Priors):
        changes = {"source": {"image_size": images.image_shape[1]}}
    else:
        with named_as_settings():
            solver = choose_solver(images.scheduler, config.sampler.solver)
        sampler = {"solver": solver, "attention": _choose_attention(job, images)}
        changes = {"sampler": sampler | _own_steps(config.sampler, images)}
        if config.sampler.experimental_fp8:
            if not isinstance(images.module, LeanDiT):
                got = f"true for a {type(images.module).__name__}"
                raise invalid("sampler.experimental_fp8", got, "a DiT", "set it to false")
            images.module.use_fp8()
    return replace(job, config=load_config(DistillConfig, config, changes))


def compiles(
    setting: bool | Literal["auto"], device: torch.device, *, name: str = "train.compile"
) -> bool:
    """Return whether to compile a network, the one rule for `compile: auto`.

    "auto" compiles on CUDA, where Triton is present. On a CPU the denoiser runs fused kernels
    already, and training gains only in long runs, whose configs say `compile: true`.

    Args:
        setting: Value of the setting.
        device: Device of the network.
        name: Name of the setting, for the message.

    Raises:
        UserError: `setting` is true, and this machine cannot compile.
    """
    able = can_compile(device.type)
    if setting == "auto":
        return able and device.type == "cuda"
    if setting and not able:
        lacks = f"{'Triton, a C' if device.type == 'cuda' else 'a C++'} compiler or Python.h"
        raise invalid(
            name, f"true without {lacks}", "false or auto", f"install it or set {name}=auto"
        )
    return setting


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse `sampler.experimental_fp8` where the device or the dtype does not support it.

    Raises:
        UserError: The device is not a GPU of compute capability 8.9 or more, or the dtype is not
            bfloat16.
    """
    got, fix = f"true on {device.type}", "set it to false"
    capability = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        got = f"true on a GPU of compute capability {capability[0]}.{capability[1]}"
    if capability < FP8_CAPABILITY:
        raise invalid("sampler.experimental_fp8", got, "a GPU of 8.9 or more", fix)
    if dtype != torch.bfloat16:  # the only result of products with a scale for each row
        got = f"true with dtype {str(dtype).removeprefix('torch.')}"
        raise invalid("sampler.experimental_fp8", got, "bfloat16", "set dtype=bfloat16")


def _own_steps(config: SamplerConfig, denoiser: Denoiser) -> dict[str, Any]:
    """Return the steps and the guidance that a denoiser asks for, where the config says auto."""
    own = {"num_steps": denoiser.own_steps, "guidance_scale": denoiser.own_guidance_scale}
    return {name: value for name, value in own.items() if getattr(config, name) == "auto"}


def _choose_attention(job: ResolvedJob, denoiser: Denoiser) -> str:
    name = job.config.sampler.attention
    if isinstance(denoiser.weak, LeanDiT):
        denoiser.weak.choose_attention("auto", device=job.device, dtype=job.dtype)
    if isinstance(denoiser.module, LeanDiT):
        return denoiser.module.choose_attention(name, device=job.device, dtype=job.dtype)
    if name not in ("auto", "sdpa"):
        got = f"{name} for a {type(denoiser.module).__name__}"
        raise invalid("sampler.attention", got, "sdpa", "set sampler.attention=auto")
    return "sdpa"
