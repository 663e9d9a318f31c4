"""Sampler, ring, block files and checkpoints of a job together: no stream races another.

The sanitizer watches what the job really issues (`stream_sanitizer.py`); planted faults show that
it would notice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rings import new_ring
from small_jobs import fit_until, sampler_of, small_classifier, tiny_sampler
from stream_sanitizer import Log, Names, sanitized

from benchmarks.fake_cuda import pretended
from dmkd_fast import (
    Distiller,
    GeneratedImages,
    LabelStream,
    Schedule,
    StudentTrainer,
    Targets,
    Views,
    ViewSpec,
)
from dmkd_fast.ring.cuda_sync import ProducerStream


def job(run_dir: Path, every_s: float) -> Distiller:
    """Four steps; each replaces all images of the ring: four blocks, one of them guarded."""
    torch.manual_seed(3)
    return Distiller(
        GeneratedImages(LabelStream(4, device="cuda"), tiny_sampler(device="cuda")),
        new_ring(
            device="cuda",
            num_classes=4,
            guard_blocks=1,
            samples_per_insert=0.75,
            min_fill_images=48,
        ),
        StudentTrainer(
            small_classifier().cuda(),
            Schedule(
                batch_size=48,
                num_views=4 * 48,
                lr=1e-3,
                log_every_steps=2,
                ema_decay=0.9,
                checkpoint_every_s=every_s,
            ),
        ),
        Targets(
            small_classifier().cuda(),
            Views(ViewSpec(size=8, mean=(0.5,), std=(0.5,), device="cuda"), pad=1),
        ),
        run_dir,
        show=False,
    )


def watched(run_dir: Path, log: Log, *, every_s: float = 1e-6) -> Distiller:
    """Run half of a job, resume it in another, and run that to its end."""
    with pretended(), sanitized(log):
        first = job(run_dir, every_s)
        log.images = first.ring.images
        fit_until(first, 2)
        log.synchronize()  # one process ends, the next one begins
        second = job(run_dir, every_s)
        log.images = second.ring.images
        second.restore()
        second.fit()
    return second


def test_a_job_with_checkpoints_has_no_race(tmp_path: Path) -> None:
    log = Log()
    run = watched(tmp_path / "run", log)
    assert log.races == []
    assert isinstance(run.ring._streams, ProducerStream) and run.step == 4
    assert sampler_of(run)._graph is not None
    assert log.calls["synchronize in _write"] > 12  # block files
    assert log.calls["synchronize in wait"] > 4  # checkpoints


@pytest.mark.slow
def test_a_job_without_checkpoints_has_no_race(tmp_path: Path) -> None:
    log = Log()
    watched(tmp_path / "run", log, every_s=1e9)
    assert log.races == []


# A call is left out by its kind and the functions that make it, innermost first.
PLANTED: dict[str, Callable[[str, Names], bool]] = {
    "event after the copy of a block": lambda kind, at: kind == "record" and at[0] == "_queue",
    "writer waits for the copy": lambda kind, at: kind == "synchronize" and at[0] == "_write",
    "event after the copies of a checkpoint": lambda kind, at: (
        kind == "record" and at[:2] == ("__init__", "_copy")
    ),
    "writer waits for the checkpoint": lambda kind, at: kind == "synchronize" and at[0] == "wait",
    "event after a block": lambda kind, at: kind == "record" and at[0] == "producing",
    "consumer waits for a block": lambda kind, at: kind == "wait" and at[0] == "before_commit",
    "producer waits for the readers": lambda kind, at: kind == "wait" and at[0] == "before_write",
    "event after a checkpoint": lambda kind, at: kind == "record" and at[0] == "_restart",
    "streams of a capture": lambda kind, at: kind == "wait" and at[0] == "new_stream",
}
# Checkpoints make the producer wait for everything, so these two count only between them.
BETWEEN_CHECKPOINTS: dict[str, Callable[[str, Names], bool]] = {
    "event after a gather": lambda kind, at: (
        kind == "record" and at[0] == "after_gather" and "draw" in at
    ),
    "event after the copies of new blocks": lambda kind, at: (
        kind == "record" and at[0] == "after_gather" and "draw" not in at
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_race_is_noticed(name: str, tmp_path: Path) -> None:
    log = Log(PLANTED[name])
    watched(tmp_path / "run", log)
    assert log.races


@pytest.mark.slow
@pytest.mark.parametrize("name", BETWEEN_CHECKPOINTS)
def test_a_planted_race_between_checkpoints_is_noticed(name: str, tmp_path: Path) -> None:
    log = Log(BETWEEN_CHECKPOINTS[name])
    watched(tmp_path / "run", log, every_s=1e9)
    assert log.races
