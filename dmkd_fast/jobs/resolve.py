"""Replace every "auto" of a config by a value for this machine."""

from __future__ import annotations

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.jobs import networks, run_dir
from dmkd_fast.runtime.device import can_compile, resolve_device, resolve_dtype, set_num_threads
from dmkd_fast.runtime.distributed import ALONE, Ranks, use_device
from dmkd_fast.runtime.errors import UserError, invalid


def resolve(config: DistillConfig, ranks: Ranks = ALONE) -> DistillConfig:
    """Replace every "auto" that depends on the machine; the result is saved with the run.

    Raises:
        UserError: The machine does not have what the config asks for.
    """
    use_device(ranks, config.device)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    first, *more = (networks.pinned(teacher) for teacher in config.teachers.values())
    if config.ring.overlap and device.type != "cuda":
        raise UserError(
            f"ring.overlap: got true with device {device.type}, which has one stream, expected "
            "false; set ring.overlap=false"
        )
    if config.source is not None and config.source.follow and ranks.world_size > 1:
        raise invalid(
            "source.follow",
            f"true with {ranks.world_size} ranks",
            "false, as each would find new shards at another time",
            "let dmkd generate finish first",
        )
    sampler, train = config.sampler.compile, config.train.compile
    # On a CPU compilation gains little, since the denoiser runs fused kernels already. It pays off
    # for the student in long runs only, where it is switched on by hand (docs/notebook.md).
    able = device.type == "cuda" and can_compile(device.type)
    sampler = able if sampler == "auto" else sampler
    train = able if train == "auto" else train
    return run_dir.name_new(config).model_copy(
        update={
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "num_threads": set_num_threads(
                config.num_threads, num_processes=ranks.local_world_size
            ),
            "sampler": config.sampler.model_copy(update={"compile": sampler}),
            "train": config.train.model_copy(update={"compile": train}),
            "teacher": first,
            "more_teachers": tuple(more),
        }
    )
