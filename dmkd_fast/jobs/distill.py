"""Run a whole distillation job: resolve the config, load the parts, train, write the results."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import dump_config, load_config
from dmkd_fast.config.overrides import Overrides
from dmkd_fast.jobs import memory, results, run_dir
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.images import describe_images
from dmkd_fast.jobs.inspect import plan
from dmkd_fast.jobs.inspect.rates import Rates
from dmkd_fast.jobs.parts import Parts, prepare
from dmkd_fast.jobs.report.live import page_of
from dmkd_fast.jobs.resolve import ResolvedJob
from dmkd_fast.runtime import distributed
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.runtime.output.profile import StepProfile
from dmkd_fast.sampling.hooks import NO_HOOKS, Guide, Hooks, Selection
from dmkd_fast.training.distiller import Distiller


def distill(
    config: str | Path | DistillConfig,
    *,
    resume: bool = False,
    show: bool = True,
    on_row: Callable[[dict[str, Any]], object] | None = None,
    guide: Callable[[nn.Module], Guide] | None = None,
    selection: Callable[[nn.Module], Selection] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Run a whole distillation job and leave its results in the run directory.

    The results are the student, pictures, statistics and a model card. On CUDA, the job
    sets which kernels PyTorch may choose in this process (`repeatable`).

        distill("configs/fashion_mnist.yaml", seed=1, train={"num_views": 48_000})

    Args:
        config: Path of a YAML file, or a config.
        resume: Whether to continue from the newest checkpoint of the run. Ranks that torchrun has
            restarted continue in any case.
        show: Whether to print progress.
        on_row: Function called with each row of stats.jsonl, on rank 0. An error that it raises
            ends the run.
        guide: Function of the student that returns a `Guide`, a hook between denoiser and step.
        selection: Function of the student that returns a `Selection` among generated images.
        overrides: Settings to change. A dictionary changes the settings of a section that it names.

    Returns:
        The summary that the command line prints as its last line; empty on all ranks but the
        first.

    Raises:
        UserError: A setting or a file is wrong, and nothing was written; or training cannot
            continue, and a checkpoint has been saved.
        KeyboardInterrupt: Training was interrupted; a checkpoint has been saved.
    """

    def hooks(student: nn.Module) -> Hooks:
        return Hooks(
            guide=_hook("guide", guide, student), selection=_hook("selection", selection, student)
        )

    return run(config, overrides, resume=resume, show=show, on_row=on_row, hooks=hooks)


def run(
    config: str | Path | DistillConfig,
    overrides: Overrides = (),
    *,
    resume: bool = False,
    show: bool = True,
    ranks: Ranks | None = None,
    on_row: Callable[[dict[str, Any]], object] | None = None,
    profile_steps: int | None = None,
    hooks: Callable[[nn.Module], Hooks] = lambda _: NO_HOOKS,
) -> dict[str, Any]:
    """Run a whole distillation job; see `distill`.

    Args:
        config: Path of a YAML file, or a config, resolved or not.
        overrides: Settings to change, as `load_config` takes them.
        resume: Whether to continue from the newest checkpoint of the run.
        show: Whether to print progress.
        ranks: This process and the number of processes that run the job together. None: as
            torchrun has started them.
        on_row: See `distill`.
        profile_steps: Number of steps to trace with the profiler; None: none.
        hooks: Function of the student that returns the objects of `distill`.

    Raises:
        UserError, KeyboardInterrupt: See `distill`.
    """
    clock = Clock()
    ranks = distributed.join() if ranks is None else ranks
    show = show and ranks.is_first
    with ranks.agreed():
        loaded = run_dir.load(DistillConfig, config, overrides, resume=resume)
    loaded, resume = _place(loaded, resume, ranks)
    with ranks.agreed():
        # The other ranks hold settings of their own, and may see the files later.
        ended = run_dir.finished(loaded) if resume and ranks.is_first else None
    if ranks.gather("" if ended is None else "ended")[0]:
        return ended or {}
    with ranks.agreed():
        job, parts = prepare(run_dir.find(loaded) if resume else loaded, ranks)
        memory.check(job, parts)
        made = hooks(parts.student)
        job = replace(job, config=_with_names(job.config, made))
    with memory.explained(job, parts):
        distiller = build(job, parts, hooks=made, show=show)
        distiller.clock = clock  # Loading counts as part of the run.
        if on_row is not None:
            distiller.on_row.append(on_row)
        if profile_steps is not None and ranks.is_first:
            place, display = distiller.run_dir, distiller.display
            distiller.profile = StepProfile(place, clock, display, profile_steps)
        return _run(job, parts, distiller, resume=resume, show=show)


def dry_run(config: str | Path | DistillConfig, overrides: Overrides = ()) -> Iterator[str]:
    """Yield the lines of the resolved config and of the plan, without measuring or writing.

    Raises:
        UserError: A setting or a file is wrong, or the run does not fit into memory.
    """
    ranks = distributed.join()
    with ranks.agreed():
        loaded = load_config(DistillConfig, config, overrides)
    if not ranks.is_first:
        return
    job, parts = prepare(loaded, ranks)
    yield dump_config(job.config).rstrip("\n")
    yield from plan.memory_lines(memory.plan(job, parts), num_ranks=ranks.world_size)
    yield from plan.lines(plan.make(job, parts, Rates()))


def _run(
    job: ResolvedJob, parts: Parts, distiller: Distiller, *, resume: bool, show: bool
) -> dict[str, Any]:
    folder, ranks = Path(job.config.run_dir), job.ranks
    with ranks.agreed():
        if not resume:  # Refuse the folder before anything is written to it.
            distiller.checkpoints.check_folder()
    with run_dir.locked(folder, ranks=ranks):
        if resume:
            run_dir.restore(distiller)
        with ranks.agreed():
            distiller.checkpoints.check_folder()
            if ranks.is_first and resume:
                run_dir.mark(folder, ranks.launch)
            elif ranks.is_first:
                run_dir.claim(job.config, launch=ranks.launch)
        if show:
            print(describe_images(job.config, parts.origin), file=sys.stderr)
            print(f"teacher: weights under license {parts.teachers.license}", file=sys.stderr)
        page = page_of(distiller, job, parts) if ranks.is_first else None
        with contextlib.nullcontext() if page is None else page.watching():
            with run_dir.resume_hint(folder, run_dir.resume_command(folder, ranks), ranks):
                distiller.fit()
            return {} if page is None else results.write(distiller, job.config, parts, page)


def _hook(name: str, maker: Callable[[nn.Module], Any] | None, student: nn.Module) -> Any:
    """Return the hook of a run, from a caller's function of the student."""
    if maker is None:
        return None
    if not callable(maker) or (hasattr(maker, "is_function_of_id") and not isinstance(maker, type)):
        got, expected = f"a {type(maker).__name__}", "a function of the student that returns one"
        raise invalid(name, got, expected, f"write {name}=lambda student: ...")
    hook = maker(student)
    is_one = isinstance(hook, Selection) if name == "selection" else callable(hook)
    if not is_one:
        got = f"a function of the student that returns a {type(hook).__name__}"
        raise invalid(name, got, f"one that returns a {name.capitalize()}")
    return hook


def _with_names(config: DistillConfig, hooks: Hooks) -> DistillConfig:
    """Return the config with the names of the caller's hooks, which it may have already."""
    if config.hooks and list(config.hooks) != hooks.names:
        got, expected = (", ".join(names) or "none" for names in (hooks.names, config.hooks))
        fix = "call dmkd_fast.distill with guide and selection, or remove hooks"
        raise invalid("hooks", got, expected, fix)
    return config.model_copy(update={"hooks": tuple(hooks.names)})


def _place(config: DistillConfig, resume: bool, ranks: Ranks) -> tuple[DistillConfig, bool]:
    """Return the config with its run directory, and whether to resume, as rank 0 decides."""
    answer = ""
    with ranks.agreed():
        if ranks.world_size > ranks.local_world_size and config.run_dir == "auto":
            raise invalid("run_dir", "auto on several machines", "a directory that all of them see")
    # A machine that replaces a lost one has not restarted, but the others have.
    restarted = any(int(count) for count in ranks.gather(str(ranks.restarts)))
    with ranks.agreed():
        if ranks.is_first:
            ours = run_dir.find_launched(config, ranks.launch) if restarted else None
            if ours is not None:
                config, resume = ours, True
            config = run_dir.find(config) if resume else run_dir.name_new(config)
            if not resume:
                run_dir.check_new(config)
            answer = json.dumps([config.run_dir, resume])
    place, resume = json.loads(ranks.gather(answer)[0])
    return config.model_copy(update={"run_dir": place}), resume
