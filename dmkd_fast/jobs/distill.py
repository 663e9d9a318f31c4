"""Run a whole distillation job: resolve the config, load the parts, train, write the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.jobs import memory, results, run_dir
from dmkd_fast.jobs.build import build
from dmkd_fast.jobs.images import describe_images
from dmkd_fast.jobs.parts import Parts, prepare
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import UserError


def run(
    config: DistillConfig, *, resume: bool = False, show: bool = True, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Run a whole distillation job and leave its results in the run directory.

    The results are the student, pictures, statistics and a model card.

    Args:
        config: Settings of the job, resolved or not.
        resume: Whether to continue from the newest checkpoint of `config.run_dir`. Ranks that
            torchrun has restarted continue in any case.
        show: Whether to print progress.
        ranks: This process and the number of processes that run the job together.

    Returns:
        The summary that the command line prints as its last line; empty on all ranks but the
        first.

    Raises:
        UserError: A setting or a file is wrong, and nothing was written; or training cannot
            continue, and a checkpoint has been saved.
        KeyboardInterrupt: Training was interrupted; a checkpoint has been saved.
    """
    clock, show = Clock(), show and ranks.is_first
    config, resume = _place(config, resume, ranks)
    with ranks.agreed():
        config, parts = prepare(run_dir.find(config) if resume else config, ranks)
        memory.check(config, parts, ranks)
    with memory.explained(config, parts, ranks):
        return _run(config, parts, clock, resume=resume, show=show, ranks=ranks)


def _run(
    config: DistillConfig, parts: Parts, clock: Clock, *, resume: bool, show: bool, ranks: Ranks
) -> dict[str, Any]:
    distiller = build(config, parts, show=show, ranks=ranks)
    distiller.clock = clock  # Loading counts as part of the run.
    folder = Path(config.run_dir)
    with ranks.agreed():
        if not resume:  # Refuse the folder before anything is written to it.
            distiller.checkpoints.check_folder()
    with run_dir.locked(folder, ranks=ranks):
        if resume and run_dir.has_checkpoint(folder):
            restored = distiller.restore()
            for note in restored.notes:
                print(note, file=sys.stderr)
        with ranks.agreed():
            distiller.checkpoints.check_folder()
            if ranks.is_first and resume:
                run_dir.mark(folder, ranks.launch)
            elif ranks.is_first:
                run_dir.claim(config, launch=ranks.launch)
        if show:
            print(describe_images(config, parts.origin), file=sys.stderr)
            print(f"teacher: weights under license {parts.teachers.license}", file=sys.stderr)
        with run_dir.resume_hint(folder, run_dir.resume_command(folder, ranks), ranks):
            distiller.fit()
        return results.write(distiller, config, parts) if ranks.is_first else {}


def _place(config: DistillConfig, resume: bool, ranks: Ranks) -> tuple[DistillConfig, bool]:
    """Return the config with its run directory, and whether to resume, as rank 0 decides."""
    answer = ""
    with ranks.agreed():
        if ranks.world_size > ranks.local_world_size and config.run_dir == "auto":
            raise UserError(
                "run_dir: got auto on several machines, expected a directory that all of them see"
            )
        if ranks.is_first:
            ours = run_dir.find_launched(config, ranks.launch) if ranks.restarts else None
            if ours is not None:
                config, resume = ours, True
            config = run_dir.find(config) if resume else run_dir.name_new(config)
            if not resume:
                run_dir.check_new(config)
            answer = json.dumps([config.run_dir, resume])
    place, resume = json.loads(ranks.gather(answer)[0])
    return config.model_copy(update={"run_dir": place}), resume
