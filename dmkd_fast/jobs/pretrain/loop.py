"""The training loop that all kinds of `dmkd pretrain` share, and the real images they train on.

The last `HELD_OUT` training images are never trained on; all settings are chosen by results on
them. The test set is evaluated once, after the last step, and is only reported. Shapes: batch B.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dmkd_fast.checkpoint import step_folders
from dmkd_fast.config.jobs import PretrainConfig
from dmkd_fast.config.loading import dump_config
from dmkd_fast.data import test_sets
from dmkd_fast.jobs import memory, resolve, run_dir
from dmkd_fast.runtime import files
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.device import resolve_device, resolve_dtype, set_num_threads
from dmkd_fast.runtime.errors import NotFiniteError, UserError
from dmkd_fast.runtime.signals import Interrupts
from dmkd_fast.training.ema import WeightEMA
from dmkd_fast.training.metrics import Metrics
from dmkd_fast.training.schedule import Schedule
from dmkd_fast.training.student import StudentTrainer

P = TypeVar("P", bound=PretrainConfig)
HELD_OUT = 5_000
less_memory = memory.named("lower train.batch_size, or raise train.accumulate")


@dataclass(kw_only=True)
class RealData:
    """Real images on the training device, in three sets."""

    train: test_sets.ImageSet
    held_out: test_sets.ImageSet
    test: test_sets.ImageSet


def load_real(folder: Path, device: torch.device) -> RealData:
    """Read an idx folder; the last 5,000 training images become the held-out set.

    Raises:
        UserError: A file is missing or damaged, or there are too few images.
    """
    full = test_sets.load_idx(folder, "train").to(device)
    if len(full.labels) <= HELD_OUT:
        raise UserError(
            f"{folder}: got {len(full.labels)} training images, expected more than the {HELD_OUT} "
            "that are held out; use a larger set"
        )
    parts = (
        test_sets.ImageSet(
            images=full.images[part], labels=full.labels[part], class_names=full.class_names
        )
        for part in (slice(None, -HELD_OUT), slice(-HELD_OUT, None))
    )
    train, held_out = parts
    return RealData(
        train=train, held_out=held_out, test=test_sets.load_idx(folder, "t10k").to(device)
    )


@contextlib.contextmanager
def results(folder: Path) -> Iterator[Path]:
    """Create the folder `model` of a finished run; it gets its name once complete on disk.

    Raises:
        UserError: The folder cannot be written. The last checkpoint holds the trained model.
    """
    try:
        with files.new_folder(folder / "model") as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        path = getattr(error, "filename", None) or folder / "model"
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot write ({reason}); training is finished and saved; free space or fix "
            "the folder, then run it again with --resume"
        ) from None


def train(
    config: PretrainConfig,
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    num_examples: int,
    folder: Path,
    resume: bool,
    dtype: torch.dtype,
    before_step: Callable[[Tensor], None] | None = None,
) -> tuple[WeightEMA, dict[str, Any]]:
    """Train a model in shuffled passes over numbered examples; a stopped run can be resumed.

    Args:
        config: Settings of the job, of which length, batch, optimizer and seed are used.
        model: Model that is trained in place.
        loss_of: Loss function, (indices (B,), passes (B,)) -> scalar loss, mean over the examples.
            An example's pass tells how often it has been used before.
        num_examples: Number of examples in one pass.
        folder: Run directory.
        resume: Whether to continue from the newest checkpoint.
        dtype: Compute dtype of `loss_of`; with float16 the loss is scaled.
        before_step: Function called with the passes (B,) before each step. It may take long, since
            it can be interrupted, unlike a step.

    Returns:
        The weight EMA of the model, and the figures views, wall_s, cpu_s, num_threads, parameters.

    Raises:
        UserError: The checkpoint cannot be restored, or the loss or gradients stayed NaN or
            infinite, and a checkpoint has been saved.
        KeyboardInterrupt: Training was interrupted; a checkpoint holds all steps taken so far.
    """
    batch, train = config.train.batch_size, config.train
    num_steps = -(-train.num_views // batch)
    settings = config.train.model_dump(exclude={"compile"}) | config.optim.model_dump()
    schedule = Schedule(**settings)
    learner = StudentTrainer(model, schedule=schedule, dtype=dtype)
    clock = Clock()
    metrics = Metrics(folder, num_steps * batch)
    saved: dict[str, step_folders.Stateful] = {
        "clock": clock,
        "model": model,
        "optimizer": learner.optimizer,
        "average": learner.average,
        "learner": learner,
        "metrics": metrics,
    }
    checkpoints, first = folder / run_dir.CHECKPOINTS, 0
    if resume and run_dir.has_checkpoint(folder):
        first, notes = step_folders.restore(checkpoints, saved)
        for note in notes:
            metrics.note(note)
    metrics.begin(views=first * batch, wall_s_before=clock.wall_s())
    device = next(model.parameters()).device
    last_saved = time.monotonic()
    interrupts, done = Interrupts(), first
    model.train()
    try:
        with interrupts:
            try:
                for step, indices, uses in _batches(
                    num_examples, batch, first, num_steps, config.seed
                ):
                    if before_step is not None:
                        before_step(uses)
                    # The first step may compile for long, and interrupting it loses nothing.
                    with interrupts.held() if step > first else contextlib.nullcontext():
                        # One seed per step makes a resumed run draw the same random numbers.
                        torch.manual_seed((config.seed * 1_000_003 + step) % 2**63)
                        learner.start(schedule.lr_at(step))
                        parts = zip(
                            indices.to(device).split(schedule.micro_batch),
                            uses.to(device).split(schedule.micro_batch),
                            strict=True,
                        )
                        losses = [
                            learner.backward(loss_of(*part) / schedule.accumulate) for part in parts
                        ]
                        learner.finish()
                        done = step + 1
                        metrics.add("loss", sum(losses[1:], losses[0]))
                        if done % train.log_every_steps == 0 or done == num_steps:
                            row = metrics.flush(
                                views=done * batch, lr=schedule.lr_at(step), counts=learner.counts()
                            )
                            learner.check(row["skipped_in_a_row"])
                    if time.monotonic() - last_saved > train.checkpoint_every_s:
                        with interrupts.held():
                            try:
                                step_folders.save(checkpoints, done, saved)
                            except files.SaveError as error:
                                metrics.note(str(error))
                        last_saved = time.monotonic()
                step_folders.save(checkpoints, num_steps, saved)
            except KeyboardInterrupt:
                if done > first:
                    path = step_folders.save(checkpoints, done, saved)
                    metrics.note(f"interrupted; saved {path}")
                    metrics.note(f"to go on, add run_dir={folder} --resume")
                raise
            except NotFiniteError as error:
                path = step_folders.save(checkpoints, done, saved)
                raise UserError(f"{error}; saved {path}") from None
    finally:
        metrics.close()
    facts = {
        "views": num_steps * batch,
        "wall_s": round(clock.wall_s(), 1),
        "cpu_s": round(clock.cpu_s(), 1),
        "num_threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return learner.average, facts


def _batches(
    num_examples: int, batch: int, first: int, num_steps: int, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, indices (B,), passes (B,)) from step `first` on, in shuffled passes."""
    orders: dict[int, Tensor] = {}
    for step in range(first, num_steps):
        places = torch.arange(step * batch, (step + 1) * batch)
        passes = places // num_examples
        for number in passes.unique().tolist():
            if number not in orders:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
                orders[number] = torch.randperm(num_examples, generator=generator)
                orders.pop(number - 2, None)
        chosen = [
            orders[int(p)][int(i)] for p, i in zip(passes, places % num_examples, strict=True)
        ]
        yield step, torch.stack(chosen), passes


def prepare(config: P, resume: bool) -> tuple[P, torch.device, torch.dtype]:
    """Return the settings of the run (the saved ones on resume), its device and dtype."""
    config = run_dir.find(config) if resume else run_dir.name_new(config)
    if not resume:
        run_dir.check_new(config)
    set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)
    return config, device, resolve_dtype(config.dtype, device)


def compiles(config: PretrainConfig, device: torch.device) -> bool:
    """Return whether to compile the model."""
    return resolve.compiles(config.train.compile, device)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return an autocast context for `dtype`, disabled for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def write_card(
    folder: Path,
    title: str,
    verb: str,
    config: PretrainConfig,
    facts: dict[str, Any],
    *,
    source: str = f"the training images less the last {HELD_OUT:,}; the test images decided "
    "nothing",
) -> None:
    """Write README.md beside the weights: command, settings and figures."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = (
        f"# {title}\n\nMade by `dmkd {verb}` with the settings below, from {source}. The figures "
        f"are those of the last step.\n\n| figure | value |\n|---|---|\n{rows}\n\n"
        f"```yaml\n{dump_config(config)}```\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
