"""Plan the ring and the memory of a run, and check both before anything is allocated."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.jobs.inspect.activations import peak_bytes
from dmkd_fast.ring.orders import check_order
from dmkd_fast.ring.plan import RingPlan
from dmkd_fast.runtime.checks import check_accumulate
from dmkd_fast.runtime.device import available_bytes, is_out_of_memory
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.sampling.sampler import FEWEST_IMAGES, MOST_DECODED

if TYPE_CHECKING:
    from dmkd_fast.jobs.images import Origin
    from dmkd_fast.jobs.parts import Parts
    from dmkd_fast.jobs.resolve import ResolvedJob


BLOCK, VIEWS, SAVED = "block being made", "views of a batch", "saved for the backward pass"
GRAPH, TEACHING = "graph of the sampler", "activations of the teachers"
_WHAT_HELPS = {
    BLOCK: "lower sampler.micro_batch_images (or source.block_images)",
    VIEWS: "lower train.batch_size or views.size",
    GRAPH: "lower sampler.micro_batch_images",
    TEACHING: "lower train.batch_size, or raise train.accumulate",
    "pool_images": "lower pool_images",
    "weights, gradients, optimizer, average": "lower num_layers, num_heads or head_dim",
    SAVED: "lower train.batch_size or views.size, or raise train.accumulate",
}


def ring_plan(
    config: DistillConfig, image_shape: tuple[int, int, int] = (1, 1, 1), ranks: Ranks = ALONE
) -> RingPlan:
    """Plan the ring of one rank, and check it against the batch size of the rank.

    Args:
        config: Config of the whole run.
        image_shape: Shape of one image, (c, H, W); all checks but those of memory work without it.
        ranks: Processes that divide the ring and the batch.

    Raises:
        UserError: A setting is wrong, or the ring or the batch cannot be divided.
    """
    ring, train = config.ring, config.train
    with _named_as("ring"):
        # The number of classes is not known yet.
        check_order(ring.order, max_uses=ring.max_uses, num_classes=1)
        plan = RingPlan(
            **ring.model_dump(exclude={"order", "overlap"}),
            image_shape=image_shape,
            block_images=config.block_images,
            guard_blocks=int(ring.overlap),
        ).per_rank(ranks)
    batch_size = ranks.per_rank("train.batch_size", train.batch_size)
    with _named_as("train" if batch_size > plan.drawable_images else "ring", ranks):
        plan.check_batch(batch_size)
    with _named_as("train", ranks):
        check_accumulate(train.accumulate, batch_size=batch_size)
    return plan


@contextmanager
def _named_as(section: str, ranks: Ranks = ALONE) -> Iterator[None]:
    """Name the section of a wrong setting, and the ranks if its value is that of one rank."""
    try:
        yield
    except UserError as error:
        count = ranks.world_size
        of_each = f" (of each of {count} ranks)" if count > 1 else ""
        raise UserError(f"{error.within(section)}{of_each}") from None


def plan(job: ResolvedJob, parts: Parts) -> dict[str, int]:
    """Estimate the bytes that each part of a run takes on the device of one rank.

    On a GPU, the activations of the sampler and of the teachers are counted as well: the CUDA graph
    of the sampler keeps its memory for the whole run.
    """
    config, compute = job.config, job.dtype
    weights = sum(p.numel() for p in parts.student.parameters())
    moments = 1 if config.optim.name == "sgd" else 2
    sizes_of_ring = ring_plan(config, parts.origin.image_shape, job.ranks)
    ring, stored = sizes_of_ring.num_bytes, {}
    if parts.stored is not None:
        stored["stored logits"] = sizes_of_ring.num_slots * parts.stored.plan.logits_bytes
    pixel = 4 if config.source is None else 1  # Generated as float32, read from disk as uint8.
    batch_size = job.ranks.per_rank("train.batch_size", config.train.batch_size)
    sizes = dict.fromkeys([parts.student_spec.input, *parts.teachers.together.inputs])
    return (
        {f"ring {name}": count for name, count in ring.items()}
        | {
            "denoiser": _weight_bytes(parts.origin, compute.itemsize),
            **_prompt_bytes(parts.origin, compute, config.sampler.micro_batch_images),
            **stored,
            "teacher": 4 * sum(p.numel() for p in parts.teachers.together.parameters()),
            "student, gradients, optimizer, average": 4 * weights * (3 + moments),
            "test images": parts.test_set.num_bytes,
            BLOCK: pixel * config.block_images * math.prod(parts.origin.image_shape),
        }
        | batch_plan(
            parts.student,
            batch_size,
            config.train.accumulate,
            parts.student_spec.in_chans,
            [spec.size for spec in sizes],
            dtype=compute,
            # On a GPU, compilation saves at most as much as eager mode.
            compiled=job.compile_student and job.device.type == "cpu",
        )
        | (_activations(job, parts) if job.device.type == "cuda" else {})
    )


def _activations(job: ResolvedJob, parts: Parts) -> dict[str, int]:
    """Estimate the bytes of the activations of the sampler and of the teachers."""
    config, dtype = job.config, job.dtype
    counts = {}
    if isinstance(parts.origin, Denoiser):
        counts[GRAPH] = _sampler_bytes(config, parts.origin, dtype, job.device)
    if parts.stored is None:
        rows = job.ranks.per_rank("train.batch_size", config.train.batch_size)
        rows //= config.train.accumulate
        members = parts.teachers.together.members
        counts[TEACHING] = max(
            peak_bytes(
                member.module,
                on_meta(member.module),
                _meta(rows, member.input.num_channels, *(member.input.size,) * 2, dtype=dtype),
            )
            for member in members
        )
    return counts


def _sampler_bytes(
    config: DistillConfig, denoiser: Denoiser, dtype: torch.dtype, device: torch.device
) -> int:
    """Estimate the bytes of the activations of one micro-batch of images."""
    sampler = config.sampler
    size = max(sampler.micro_batch_images, FEWEST_IMAGES)
    is_doubled = sampler.is_guided and not denoiser.takes_guidance
    rows = 2 * size if is_doubled else size
    inputs = [_meta(rows, *denoiser.latent_shape, dtype=dtype), _meta(rows)]
    inputs.append(_meta(rows, dtype=torch.int64))
    if denoiser.takes_guidance:
        inputs.append(_meta(rows))
    need = peak_bytes(denoiser.module, on_meta(denoiser.module), *inputs)
    if denoiser.decoder is not None:
        latents = _meta(min(size, MOST_DECODED[device.type]), *denoiser.latent_shape, dtype=dtype)
        need = max(need, peak_bytes(denoiser.decoder, on_meta(denoiser.decoder), latents))
    # State, estimate, noise and prediction of a step in float32, and the images.
    states = 4 * 4 * size * math.prod(denoiser.latent_shape)
    return need + states + size * math.prod(denoiser.image_shape)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight_bytes(images: Origin, itemsize: int) -> int:
    """Count the bytes of parameters that are kept on the device to generate images."""
    if not isinstance(images, Denoiser):
        return 0
    modules = [module for part in images.modules for module in part.modules()]
    rounded = [getattr(module, "fp8_weight", None) or () for module in modules]
    count = sum(p.numel() for part in images.modules for p in part.parameters())
    return itemsize * count + sum(int(w.nbytes) for pair in rounded for w in pair)


def _prompt_bytes(images: Origin, compute: torch.dtype, micro_batch_images: int) -> dict[str, int]:
    """Count the bytes of encoded prompts that a text-to-image model keeps on the device.

    The text encoders are gone by then.
    """
    if not isinstance(images, Denoiser) or not hasattr(images.module, "prompts"):
        return {}
    if images.bank is not None:
        count = images.bank.numbers_per_prompt * (micro_batch_images + 1)
    else:
        modules = [part for part in (images.module, images.weak) if part is not None]
        count = sum(table.numel() for part in modules for table in part.buffers(recurse=False))
    return {"prompts": compute.itemsize * count}


def batch_plan(
    model: nn.Module,
    batch_size: int,
    accumulate: int,
    channels: int,
    sizes: list[int],
    *,
    dtype: torch.dtype,
    compiled: bool,
) -> dict[str, int]:
    """Estimate the bytes of one batch: its views, and what autograd saves for the backward pass.

    Args:
        model: Model that is trained.
        batch_size: Views per step.
        accumulate: Number of micro-batches that a batch is split into.
        channels: Number of channels of the views.
        sizes: Sides of the views in pixels, which are kept as float32; the first is the model's.
        dtype: Compute dtype of the forward pass.
        compiled: Whether torch.compile compiles the model. It then decides what is saved, which
            counts as 0 here.
    """
    shape = (batch_size // accumulate, channels, sizes[0], sizes[0])
    saved = 0 if compiled else _saved_bytes(model, shape) * dtype.itemsize // 4
    return {VIEWS: 4 * batch_size * channels * sum(size**2 for size in sizes), SAVED: saved}


def on_meta(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers without memory, for `torch.func.functional_call`."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {
        name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in named
    }


def _saved_bytes(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count the bytes that autograd saves in a float32 forward pass, run on the meta device."""
    weights = on_meta(model)
    own = {value.untyped_storage()._cdata for value in weights.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
    # A model whose control flow depends on values cannot run on the meta device; it counts as 0.
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), hooks:
        torch.func.functional_call(model, weights, (torch.empty(shape, device="meta"),))
    return sum(storage.nbytes() for storage in kept.values())


def check(job: ResolvedJob, parts: Parts, have: int | None = None) -> int:
    """Check that a run fits into memory; return the largest ring.capacity_images that fits.

    Args:
        job: Resolved job. Its ranks on one machine share the memory of the CPU; each has its own
            GPU.
        parts: Loaded networks and data of the run.
        have: Bytes of each rank. None: those that are available on the device.

    Returns:
        The largest ring.capacity_images of the whole run that fits beside its other parts.

    Raises:
        UserError: The ring or the other parts do not fit.
    """
    ranks = job.ranks
    ring = ring_plan(job.config, parts.origin.image_shape, ranks)
    if have is None:
        have = available_bytes(job.device)
        if job.device.type == "cpu":
            have //= ranks.local_world_size
    # Test images are loaded by now, so they are not part of what still has to fit.
    others = {
        name: count
        for name, count in plan(job, parts).items()
        if not name.startswith("ring ") and name != "test images"
    }
    check_fits(others, have)
    need, rest = sum(ring.num_bytes.values()), sum(others.values())
    fits = ranks.world_size * ring.largest_capacity(have - rest)
    if need + rest > have:
        raise UserError(
            f"ring.capacity_images: got {job.config.ring.capacity_images}, which needs "
            f"{_gib(need)} GiB of {_gib(have)} GiB available"
            f"{' to each rank' * (ranks.world_size > 1)}, of which other parts take "
            f"{_gib(rest)}; lower it to at most {fits}"
        )
    return fits


def check_fits(parts: dict[str, int], have: int) -> None:
    """Refuse parts that together take more than `have` bytes.

    Raises:
        UserError: The parts do not fit. The message names the largest one and what to lower.
    """
    need, most = sum(parts.values()), max(parts, key=lambda name: parts[name])
    if need > have:
        helps = _WHAT_HELPS.get(most, "use a smaller model")
        expected = f"at least {_gib(need)} GiB ({most}: {_gib(parts[most])} GiB)"
        raise invalid("memory", f"{_gib(have)} GiB available", expected, helps)


@contextmanager
def named(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line with advice.

    Args:
        advice: Which setting to change, as the end of the message.

    Raises:
        UserError: The memory of the device or of the host is exhausted.
    """
    have = available_bytes(torch.device("cpu"))
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        left = f"{_gib(have)} GiB of cpu memory were left at the start"
        if isinstance(error, torch.OutOfMemoryError):
            left = "the memory of the GPU is exhausted"
        raise UserError(f"out of memory: {left}; {advice}") from None


@contextmanager
def explained(job: ResolvedJob, parts: Parts | None = None) -> Iterator[None]:
    """Turn an out-of-memory error of a run into one line that says which settings to lower.

    The line also lists what the run keeps, by part, and how much memory was available.

    Args:
        job: Resolved job.
        parts: Networks and data of the run; None while they are being loaded.

    Raises:
        UserError: The memory of the device or of the host is exhausted.
    """
    config, have = job.config, available_bytes(job.device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        keeps = "models and test images do not fit"
        if parts is not None:
            counts = plan(job, parts)
            ring = {"ring": sum(n for name, n in counts.items() if name.startswith("ring "))}
            rest = {name: n for name, n in counts.items() if not name.startswith("ring ")}
            each = ", ".join(f"{name} {_gib(n)}" for name, n in (ring | rest).items())
            keeps = f"it keeps {_gib(sum(counts.values()))} GiB ({each}) and activations on top"
        raise UserError(
            f"out of memory: the run had {_gib(have)} GiB of {config.device} memory left when "
            f"{'it began' if parts else 'it loaded its parts'}; {keeps}; lower train.batch_size="
            f"{config.train.batch_size}, ring.capacity_images={config.ring.capacity_images} or "
            f"{config.block_name}={config.block_images}, or raise train.accumulate="
            f"{config.train.accumulate}"
        ) from None


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
