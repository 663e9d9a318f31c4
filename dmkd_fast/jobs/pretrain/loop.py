"""The training loop that all kinds of `dmkd pretrain` share. Shapes: batch B."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dmkd_fast.config.jobs import (
    PretrainConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import dump_config, load_config
from dmkd_fast.jobs import memory, resolve, run_dir
from dmkd_fast.jobs.report import live as report_live
from dmkd_fast.runtime import files
from dmkd_fast.runtime.device import resolve_device, resolve_dtype, set_num_threads, set_repeatable
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.training.ema import WeightEMA
from dmkd_fast.training.loop import TrainingLoop
from dmkd_fast.training.schedule import Schedule
from dmkd_fast.training.student import StudentTrainer

P = TypeVar("P", bound=PretrainConfig)
less_memory = memory.named("lower train.batch_size, or raise train.accumulate")


@dataclass(frozen=True, kw_only=True)
class PretrainJob(Generic[P]):
    """The config of a run of `dmkd pretrain`, and what follows from it on this machine."""

    config: P
    device: torch.device
    dtype: torch.dtype
    """Compute dtype of the networks; with float16 the loss is scaled."""
    compiles: bool
    """Whether the trained network is compiled."""
    resume: bool
    """Whether to continue from the newest checkpoint."""
    display: Progress

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the figures of a finished run, which mark it as finished, and return them."""
        facts["run_dir"] = self.config.run_dir
        run_dir.finish(Path(self.config.run_dir), facts)
        return facts

    def compiled(self, model: nn.Module) -> Any:
        """Return the model to call in training: compiled if the job compiles."""
        return torch.compile(model) if self.compiles else model

    def autocast(self) -> torch.autocast:
        """Return a context that computes in the job's dtype."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)


@contextlib.contextmanager
def opened(config: PretrainConfig, *, resume: bool) -> Iterator[Path]:
    """Open the run directory of a job; its page says so if the job fails, after training too."""
    with run_dir.opened(config, resume=resume) as folder:
        try:
            yield folder
        except Exception as error:
            report_live.rewrite(folder, error)
            raise


@contextlib.contextmanager
def results(folder: Path) -> Iterator[Path]:
    """Create the folder `model` of a finished run; it gets its name once complete on disk.

    Raises:
        UserError: The folder cannot be written. The last checkpoint holds the trained model.
    """
    target = folder / "model"
    resume = f"run it again with run_dir={shlex.quote(str(folder))} --resume and no other setting"
    with run_dir.writing_results(target, resume), files.new_folder(target) as partial:
        yield partial
    report_live.rewrite(folder)


class ShuffledPasses:
    """Order numbered examples in passes, each shuffled in an order of its own.

    Args:
        num_examples: Number of examples in one pass.
        seed: Seed of the orders.
    """

    def __init__(self, num_examples: int, *, seed: int) -> None:
        self.num_examples, self.seed = num_examples, seed
        self._orders: dict[int, Tensor] = {}

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the indices and passes, (count,) int64 each, from position `start` on."""
        places = torch.arange(start, start + count)
        passes, places = places // self.num_examples, places % self.num_examples
        pairs = zip(passes.tolist(), places.tolist(), strict=True)
        return torch.stack([self._order(number)[place] for number, place in pairs]), passes

    def _order(self, number: int) -> Tensor:
        if number not in self._orders:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            self._orders[number] = torch.randperm(self.num_examples, generator=generator)
            self._orders.pop(number - 2, None)
        return self._orders[number]


class Pretraining(TrainingLoop):
    """Train a model in shuffled passes over numbered examples.

    Args:
        student: Model to train, with its optimizer and schedule.
        loss_of: Loss function, (indices (B,), passes (B,)) -> scalar loss, mean over the examples.
            An example's pass is how often it has been used before.
        num_examples: Number of examples in one pass.
        run_dir: Run directory.
        seed: Seed of the order of the examples, and of the random numbers of each step.
        before_step: Function called with the passes (B,) before each step. It may take long, since
            it can be interrupted, unlike a step.
        display: Display of the progress; None: one that shows it.
    """

    def __init__(
        self,
        student: StudentTrainer,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        num_examples: int,
        run_dir: Path,
        *,
        seed: int,
        before_step: Callable[[Tensor], None] | None = None,
        display: Progress | None = None,
    ) -> None:
        super().__init__(student, run_dir, display or Progress())
        self._loss_of, self._before_step, self._seed = loss_of, before_step, seed
        self._examples = ShuffledPasses(num_examples, seed=seed)
        self._micro_batches: list[tuple[Tensor, Tensor]] = []

    def train_step(self) -> Tensor:
        """Take one optimizer step and return its loss without waiting for the device."""
        # One seed per step makes a resumed run draw the same random numbers.
        torch.manual_seed((self._seed * 1_000_003 + self.step) % 2**63)
        with self.clock.part("student"):
            self.student.start(self.lr())
            losses = [
                self.student.backward(self._loss_of(*micro_batch) / self.schedule.accumulate)
                for micro_batch in self._micro_batches
            ]
            self.student.finish()
        self.step += 1
        return sum(losses[1:], losses[0])

    def _fixed_settings(self) -> dict[str, int]:
        return {**super()._fixed_settings(), "seed": self._seed}

    def _prepare_step(self) -> None:
        batch, size = self.schedule.batch_size, self.student.micro_batch_size
        indices, passes = self._examples.batch(self.step * batch, batch)
        if self._before_step is not None:
            with self.clock.part("generate"):
                self._before_step(passes)
        self._micro_batches = list(
            zip(
                indices.to(self.device).split(size), passes.to(self.device).split(size), strict=True
            )
        )

    def _run_once(self) -> None:
        if self.step < self.num_steps:
            self._prepare_step()
            self.student.warm_up(lambda: self._loss_of(*self._micro_batches[0]))


def train(
    job: PretrainJob[Any],
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    num_examples: int,
    folder: Path,
    *,
    before_step: Callable[[Tensor], None] | None = None,
) -> tuple[WeightEMA, dict[str, Any]]:
    """Train a model with the config of a job; a stopped run can be resumed.

    Args:
        job: Job, of whose config length, batch, optimizer and seed are used.
        model: Model that is trained in place.
        loss_of: Loss function, see `Pretraining`.
        num_examples: Number of examples in one pass.
        folder: Run directory.
        before_step: Function called before each step, see `Pretraining`.

    Returns:
        The weight EMA of the model, and the figures views, wall_s, cpu_s, num_threads, parameters.

    Raises:
        UserError: The checkpoint cannot be restored, or the loss or gradients stayed NaN or
            infinite, and a checkpoint has been saved.
        KeyboardInterrupt: Training was interrupted; a checkpoint has been saved.
    """
    config: PretrainConfig = job.config
    student = StudentTrainer(model, _schedule(config), dtype=job.dtype)
    run = Pretraining(
        student,
        loss_of,
        num_examples,
        folder,
        seed=config.seed,
        before_step=before_step,
        display=job.display,
    )
    if job.resume:
        run_dir.restore(run)
    kind = _kind(config)
    saved = shlex.quote(str(folder / run_dir.CONFIG))
    hint = f"dmkd pretrain {kind} {saved} --resume{'' if kind == 'fewstep' else ' --data DIR'}"
    page = report_live.pretraining_page(folder, kind, student.device, run.clock)
    run.on_row.append(page.add)
    with page.watching(), run_dir.resume_hint(folder, hint):
        totals = run.fit()
    page.write("running")  # `results` follows.
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"num_threads": torch.get_num_threads(), "parameters": parameters}
    return student.average, totals | facts


def _kind(config: PretrainConfig) -> str:
    """Return the word after `dmkd pretrain`."""
    if isinstance(config, TeacherConfig):
        return "teacher"
    return "denoiser" if isinstance(config, PretrainDenoiserConfig) else "fewstep"


def _schedule(config: PretrainConfig) -> Schedule:
    return Schedule(**config.train.model_dump(exclude={"compile"}), **config.optim.model_dump())


def finished(config: PretrainConfig, *, resume: bool) -> dict[str, Any] | None:
    """Return the figures of a run that is resumed but has ended; None for others.

    The machine need not have what such a run used.
    """
    return run_dir.finished(run_dir.find(config)) if resume else None


def prepare(config: P, *, resume: bool, show: bool) -> PretrainJob[P]:
    """Resolve a job, with the config that was saved with the run on resume.

    Raises:
        UserError: There is no run to resume, or the directory of a new one is taken; or the machine
            or timm does not have what the config asks for.
    """
    config = run_dir.find(config) if resume else run_dir.name_new(config)
    if not resume:
        run_dir.check_new(config)
    # A trial, as an optimizer is known once it is made, and the images may take minutes.
    StudentTrainer(nn.Linear(4, 4), _schedule(config))
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if device.type == "cuda":
        set_repeatable(config.repeatable)
    config = load_config(type(config), config, _resolved(config, device, dtype))
    torch.manual_seed(config.seed)
    return PretrainJob(
        config=config,
        device=device,
        dtype=dtype,
        compiles=resolve.compiles(config.train.compile, device),
        resume=resume,
        display=Progress(show=show),
    )


def _resolved(config: PretrainConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return a value for every "auto" of a config that depends on the machine."""
    changes: dict[str, Any] = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "num_threads": set_num_threads(config.num_threads),
        "train": {"compile": resolve.compiles(config.train.compile, device)},
    }
    if isinstance(config, PretrainFewstepConfig):
        compiled = resolve.compiles(config.sampler.compile, device, name="sampler.compile")
        changes["sampler"] = {"compile": compiled}
    return changes


def write_card(
    folder: Path,
    title: str,
    verb: str,
    config: PretrainConfig,
    facts: dict[str, Any],
    *,
    source: str,
) -> None:
    """Write README.md beside the weights: command, settings and figures.

    Args:
        folder: Folder of the weights.
        title: Heading.
        verb: Command after `dmkd`.
        config: Settings of the job.
        facts: Figures of the run.
        source: Noun phrase for what the model was trained on.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = (
        f"# {title}\n\nMade by `dmkd {verb}` with the settings below, from {source}. The figures "
        f"are those of the last step.\n\n| figure | value |\n|---|---|\n{rows}\n\n"
        f"```yaml\n{dump_config(config)}```\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
