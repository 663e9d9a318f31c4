"""Pretraining stops and goes on like distillation: at any time, with the same bits."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_os import FailingOs
from run_state import rows
from small_jobs import ROOT, small_classifier
from torch import Tensor, nn

from dmkd_fast import Schedule, StudentTrainer
from dmkd_fast.config.jobs import PretrainFewstepConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import run_dir
from dmkd_fast.jobs.pretrain.fewstep import pretrain_fewstep
from dmkd_fast.jobs.pretrain.loop import Pretraining, prepare
from dmkd_fast.runtime import container, files
from dmkd_fast.runtime import device as device_module
from dmkd_fast.runtime.errors import NotFiniteError, UserError

Make = Callable[..., Pretraining]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Build equal runs of 20 steps over 50 examples, with dropout and noise of each step."""
    torch.manual_seed(0)
    examples, labels = torch.randn(50, 1, 8, 8), torch.randint(4, (50,))
    count = 0

    def build(run_dir: Path | None = None, **changes: Any) -> Pretraining:
        nonlocal count
        count += 1
        torch.manual_seed(1)
        model = small_classifier(dropout=0.3)
        before_step, seed = changes.pop("before_step", None), changes.pop("seed", 3)
        settings = {"batch_size": 16, "num_views": 320, "lr": 3e-3, "accumulate": 2}
        schedule = Schedule(**(settings | {"log_every_steps": 5} | changes))

        def loss_of(indices: Tensor, passes: Tensor) -> Tensor:
            noise = torch.randn(len(indices), 1, 8, 8) * (passes[:, None, None, None] + 1)
            logits = model(examples[indices] + noise)
            return nn.functional.cross_entropy(logits, labels[indices])

        return Pretraining(
            StudentTrainer(model, schedule),
            loss_of,
            50,
            run_dir or tmp_path / f"run{count}",
            seed=seed,
            before_step=before_step,
        )

    return build


def state(run: Pretraining) -> list[Tensor]:
    return [*run.student.model.state_dict().values(), *run.student.average.module.parameters()]


def equal(a: Pretraining, b: Pretraining) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def test_a_step_is_that_of_an_eager_loop(make: Make) -> None:
    """Seeds of steps and passes, indices, micro-batches: written out once more."""
    run = make(num_views=80, name="sgd", lr=0.1, momentum=0.0, warmup=0.0)
    plain = make(num_views=80, name="sgd", lr=0.1, momentum=0.0, warmup=0.0)
    run.fit()
    orders = [
        torch.randperm(50, generator=torch.Generator().manual_seed(3 * 1_000_003 + number))
        for number in range(2)
    ]
    optimizer = torch.optim.SGD(plain.student.model.parameters(), lr=0.1)
    for step in range(5):
        places = range(16 * step, 16 * step + 16)
        indices = torch.stack([orders[place // 50][place % 50] for place in places])
        passes = torch.tensor([place // 50 for place in places])
        torch.manual_seed(3 * 1_000_003 + step)
        optimizer.param_groups[0]["lr"] = plain.schedule.lr_at(step)
        optimizer.zero_grad()
        for rows_ in (slice(0, 8), slice(8, 16)):
            (plain._loss_of(indices[rows_], passes[rows_]) / 2).backward()
        optimizer.step()
    pairs = zip(run.student.model.parameters(), plain.student.model.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "stop_at", [*(pytest.param(step, marks=pytest.mark.slow) for step in (0, 1, 19)), 7]
)
def test_resumed_run_ends_like_an_uninterrupted_one(make: Make, stop_at: int) -> None:
    whole, broken = make(), make()
    whole.fit()
    prepare = broken._prepare_step

    def interrupted() -> None:
        prepare()
        if broken.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    broken._prepare_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = make(broken.run_dir)
    assert again.restore() == (stop_at, [])
    again.fit()
    assert equal(again, whole) and rows(again.run_dir) == rows(whole.run_dir)


def test_a_signal_during_a_step_waits_for_its_end(make: Make) -> None:
    run = make()
    step = run.train_step

    def signaled() -> Tensor:
        if run.step == 7:
            signal.raise_signal(signal.SIGINT)
        return step()

    run.train_step = signaled  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert make(run.run_dir).restore() == (8, [])


def test_warm_up_changes_no_bit(make: Make) -> None:
    run = make()
    before = [value.clone() for value in state(run)]
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    run.warm_up()
    assert all(torch.equal(a, b) for a, b in zip(before, state(run), strict=True))
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in run.student.model.parameters())


@pytest.mark.slow
def test_checkpoints_are_written_in_the_background_and_a_full_disk_costs_no_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make()
    whole.fit()
    notes: list[str] = []
    writers = set()
    write, step = files.write, None

    def noted(*args: Any, **kwargs: Any) -> Any:
        writers.add(threading.current_thread())
        return write(*args, **kwargs)

    monkeypatch.setattr(files, "write", noted)
    run = make(checkpoint_every_s=1e-6)
    run.display.note = notes.append  # type: ignore[method-assign]
    step = run.train_step

    def on_a_full_disk() -> Tensor:
        if run.step == 5:
            monkeypatch.setattr(files, "os", FailingOs(0, errno.ENOSPC))
        if run.step == 12:
            while not any(
                "No space" in note for note in notes
            ):  # A slow writer's thread comes first.
                run.checkpoints.save_if_due(run.step, run._state())
            monkeypatch.setattr(files, "os", os)
        return step()

    run.train_step = on_a_full_disk  # type: ignore[method-assign]
    run.fit()
    assert writers and threading.main_thread() not in writers
    assert any("No space left on device" in note and "the run goes on" in note for note in notes)
    assert equal(run, whole)
    assert make(run.run_dir).restore() == (20, [])


def test_a_run_that_learns_nothing_stops_with_a_checkpoint(make: Make) -> None:
    run = make(max_skipped_steps=4)
    loss_of = run._loss_of
    run._loss_of = lambda *batch: loss_of(*batch) * float("nan")
    with pytest.raises(NotFiniteError, match="5 steps in a row"):
        run.fit()
    assert make(run.run_dir).restore() == (5, [])


def test_checkpoints_of_another_run_are_not_mixed_with(make: Make) -> None:
    first = make()
    first.fit()
    with pytest.raises(ValueError, match="restore them first"):
        make(first.run_dir).fit()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 32},
            r"\(train.batch_size: got 32, expected 16 as in the checkpoint; set it back\)",
        ),
        ({"seed": 4}, r"\(seed: got 4, expected 3 as in the checkpoint; set it back\)"),
    ],
)
def test_a_setting_that_gives_steps_another_meaning_is_refused(
    make: Make, changes: dict[str, int], message: str
) -> None:
    run = make()
    run.step = 10
    run._save_last()
    with pytest.raises(UserError, match=r"step-0+10: progress does not fit " + message):
        make(run.run_dir, **changes).restore()
    assert make(run.run_dir, accumulate=4, num_views=640).restore().step == 10


def test_a_checkpoint_of_an_earlier_version_is_of_the_present_settings(make: Make) -> None:
    run, again = make(), make(batch_size=32, seed=4)
    again.load_state_dict({"step": run.state_dict()["step"] + 5})
    assert again.step == 5


def test_what_auto_means_here_is_saved_and_holds_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    changes = ["train.compile=auto", "sampler.compile=auto", f"run_dir={tmp_path / 'run'}"]
    path = ROOT / "configs" / "pretrain" / "fewstep.yaml"
    given = load_config(PretrainFewstepConfig, path, changes)
    job = prepare(given, resume=False, show=False)
    saved = job.config
    assert (saved.device, f"torch.{saved.dtype}") == (job.device.type, str(job.dtype))
    assert saved.train.compile is job.compiles and isinstance(saved.sampler.compile, bool)
    assert saved.num_threads >= 1
    with run_dir.opened(saved, resume=False):
        pass
    monkeypatch.setattr(container, "num_cpus", lambda: saved.num_threads + 1)
    monkeypatch.setattr(device_module, "cpu_has_bf16", lambda: saved.dtype != "bfloat16")
    again = prepare(given, resume=True, show=False)
    assert again.config == saved and again.dtype == job.dtype


def test_a_run_that_has_ended_says_so_on_a_machine_without_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = ROOT / "configs" / "pretrain" / "fewstep.yaml"
    changes = ["device=cuda", "dtype=float16", f"run_dir={tmp_path / 'run'}"]
    config = load_config(PretrainFewstepConfig, path, changes)
    folder = run_dir.claim(config)
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").touch()
    run_dir.finish(folder, {"views": config.train.num_views})
    found = pretrain_fewstep(config, resume=True, show=False)
    assert found == {"views": config.train.num_views}
    with pytest.raises(UserError, match="CUDA"):
        prepare(config, resume=True, show=False)
