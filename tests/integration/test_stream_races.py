"""Sampler, ring, block files and checkpoints of a job together: no stream races another.

The sanitizer watches what the job really issues (`stream_sanitizer.py`); planted faults show that
it would notice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rings import new_ring
from small_jobs import fit_until, small_classifier, tiny_sampler
from stream_sanitizer import Log, sanitized

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


def job(run_dir: Path, batch: int = 48) -> Distiller:
    """Six steps; each replaces the images of the whole ring of four blocks, one of them guarded."""
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
                batch_size=batch,
                num_views=6 * batch,
                lr=1e-3,
                log_every_steps=2,
                ema_decay=0.9,
                checkpoint_every_s=1e-6,
            ),
        ),
        Targets(
            small_classifier().cuda(),
            Views(ViewSpec(size=8, mean=(0.5,), std=(0.5,), device="cuda"), pad=1),
        ),
        run_dir,
        show=False,
    )


def watched(run_dir: Path, log: Log) -> Distiller:
    """Run half of a job, resume it in another, and run that to its end."""
    with pretended(), sanitized(log):
        first = job(run_dir)
        log.images = first.ring.images
        fit_until(first, 3)
        log.synchronize()  # one process ends, the next one begins
        second = job(run_dir)
        log.images = second.ring.images
        second.restore()
        second.fit()
    return second


def test_a_job_with_checkpoints_has_no_race(tmp_path: Path) -> None:
    log = Log()
    run = watched(tmp_path / "run", log)
    assert isinstance(run.ring._streams, ProducerStream)
    for race in log.races[:10]:
        print(race)
    print(log.calls, log.num_kernels)
    assert not log.races
