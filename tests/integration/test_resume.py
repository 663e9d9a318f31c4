"""A run that was cut anywhere ends like one that was not: every bit of state, every row."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_os import FailingOs
from run_state import fingerprint, rows
from safetensors.torch import load_file
from small_jobs import CONFIG, ROOT, SHORT

from dmkd_fast import Distiller, cli
from dmkd_fast.runtime import files
from dmkd_fast.runtime.signals import Interrupts

Make = Callable[..., Distiller]
POINTS = [0, 1, 10, 17, 26, 39]


def resume_at(make: Make, stop_at: int, whole: Distiller, **settings: Any) -> None:
    """Stop a run like `whole` at a step by a signal, resume it, and compare the ends."""
    broken = make(**settings)
    step, commit = broken.train_step, broken.ring.commit

    def stopped_step() -> torch.Tensor:
        loss = step()
        if broken.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return loss

    def stopped_commit(*args: Any, **kwargs: Any) -> None:
        commit(*args, **kwargs)
        if stop_at == 0:  # While the ring is filled for the first time.
            signal.raise_signal(signal.SIGTERM)

    broken.train_step = stopped_step  # type: ignore[method-assign]
    broken.ring.commit = stopped_commit  # type: ignore[method-assign]
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = make(run_dir=broken.run_dir, **settings)
    torch.manual_seed(99)
    assert again.restore() == (stop_at, [])
    again.fit()
    assert fingerprint(again) == fingerprint(whole)
    assert rows(again.run_dir) == rows(whole.run_dir)


@pytest.mark.parametrize(
    ("seeds", "points"),
    [([0], POINTS[:4]), pytest.param([0, 1, 2], POINTS, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "sgd"])
def test_resumed_run_ends_bit_equal(
    make_distiller: Make,
    name: str,
    seeds: list[int],
    points: list[int],
    record_property: Callable[[str, object], None],
) -> None:
    record_property("claim", "resume at a step: whole state and all rows equal, tolerance 0")
    record_property("cases", len(seeds) * len(points))
    for seed in seeds:
        settings = {
            "name": name,
            "dropout": 0.3,
            "seed": seed,
            "ema_decay": 0.9,
            "max_grad_norm": 1.0,
            "log_every_steps": 10,
        }
        whole = make_distiller(**settings)
        torch.manual_seed(0)
        whole.fit()
        for point in points:
            resume_at(make_distiller, point, whole, **settings)


RECIPES: list[dict[str, Any]] = [
    {
        "accumulate": 4,
        "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        "alpha": 0.7,
        "milestones": (0.3, 0.6, 0.9),
        "ema_decay": 0.9,
    },
    {
        "name": "sgd",
        "lr": 0.02,
        "nesterov": False,
        "accumulate": 2,
        "alpha": 0.5,
        "max_grad_norm": 1.0,
        "mix": {"cutmix_alpha": 1.0},
    },
    {"dtype": torch.float16, "milestones": (0.5,), "ema_decay": 0.9, "max_grad_norm": 1.0},
]


@pytest.mark.parametrize(
    "settings",
    [RECIPES[0], *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES[1:])],
    ids=["adamw", "sgd", "float16"],
)
def test_resumed_run_ends_bit_equal_with_all_of_a_recipe_and_steps_skipped_in_between(
    make_distiller: Make, settings: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    record_property("claim", "resume of a whole recipe, skipped steps in between, tolerance 0")
    points = [0, 1, 17, 26]  # 17 and 26 lie in rows of skipped steps
    record_property("cases", len(points))

    def make(**changes: Any) -> Distiller:
        distiller = make_distiller(**changes)
        weight = next(distiller.student.model.parameters())
        skips = {0, 15, 16, 17, 18, 25, 26, 39}
        weight.register_hook(lambda grad: grad * (math.inf if distiller.step in skips else 1))
        return distiller

    settings = {"dropout": 0.3, **settings}
    whole = make(**settings)
    torch.manual_seed(0)
    whole.fit()
    found = [(row["skipped_steps"], row["skipped_in_a_row"]) for row in rows(whole.run_dir)]
    assert found == [(1, 1), (5, 4), (7, 2), (8, 1)]
    for point in points:
        resume_at(make, point, whole, **settings)


SIGNALS = {
    "KILL": "kill -9 at a random moment: resumed run ends bit-equal",
    "TERM": "SIGTERM at a random moment: exit within 5 s, checkpoint at the current step",
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("KILL", 3),
        pytest.param("KILL", 6, marks=pytest.mark.slow),
        pytest.param("TERM", 4, marks=pytest.mark.slow),
        pytest.param("KILL", 100, marks=pytest.mark.slow),
        pytest.param("TERM", 50, marks=pytest.mark.slow),
    ],
)
def test_runs_killed_at_random_end_like_undisturbed_ones(
    tmp_path: Path, name: str, count: int, record_property: Callable[[str, object], None]
) -> None:
    script = ROOT / "tests" / "helpers" / "kill_server.py"
    command = [sys.executable, str(script), str(tmp_path), name, str(count), "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"failures": done.stderr}
    record_property("claim", SIGNALS[name])
    record_property("cases", result.get("cases", 0))
    record_property("failures", len(result["failures"]))
    assert done.returncode == 0 and result["failures"] == [], (result, done.stderr)
    assert result["cases"] == count


def test_a_full_disk_during_training_costs_no_step(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_distiller()
    whole.fit()
    run, noted = make_distiller(checkpoint_every_s=1e-6), []
    run.display.note = noted.append  # type: ignore[method-assign]
    step = run.train_step

    def on_a_full_disk() -> torch.Tensor:
        if run.step == 5:
            monkeypatch.setattr(files, "os", FailingOs(0, errno.ENOSPC))
        if run.step == 20:
            monkeypatch.setattr(files, "os", os)
        return step()

    run.train_step = on_a_full_disk  # type: ignore[method-assign]
    run.fit()
    notes = [line for line in noted if "No space left on device" in line]
    assert notes and all("the run goes on" in line for line in notes)
    assert fingerprint(run) == fingerprint(whole)
    again = make_distiller(run_dir=run.run_dir)
    assert again.restore() == (40, [])


def test_a_last_checkpoint_that_fails_is_an_error(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_distiller()
    finish = run.checkpoints.finish

    def on_a_full_disk(*args: Any, **kwargs: Any) -> Path:
        monkeypatch.setattr(files, "os", FailingOs(0, errno.ENOSPC))
        return finish(*args, **kwargs)

    run.checkpoints.finish = on_a_full_disk  # type: ignore[method-assign]
    with pytest.raises(files.SaveError, match="No space left on device"):
        run.fit()


def test_a_second_signal_does_not_wait_for_the_disk(make_distiller: Make) -> None:
    run, gate = make_distiller(), threading.Event()
    run.checkpoints.writer.submit(gate.wait)  # A disk that hangs.
    step = run.train_step

    def interrupted() -> torch.Tensor:
        loss = step()
        if run.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return loss

    finish = run.checkpoints.finish

    def interrupted_again(*args: Any, **kwargs: Any) -> Path:  # Two before this would be one.
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return finish(*args, **kwargs)

    run.train_step = interrupted  # type: ignore[method-assign]
    run.checkpoints.finish = interrupted_again  # type: ignore[method-assign]
    run.blocks.append = lambda: None  # type: ignore[method-assign]
    # A job started in the background of a shell ignores SIGINT unless it is told not to.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run.fit()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert 0.5 < time.monotonic() - start < 5 and not gate.is_set()
    gate.set()
    run.checkpoints.writer.close()


def test_checkpoints_of_another_run_are_not_mixed_with(make_distiller: Make) -> None:
    first = make_distiller()
    first.fit()
    before = sorted(first.run_dir.rglob("*"))
    second = make_distiller(run_dir=first.run_dir)
    with pytest.raises(ValueError, match="restore them first"):
        second.fit()
    assert sorted(first.run_dir.rglob("*")) == before
    first.fit()  # The same one may: there is nothing left to do.
    assert len(rows(first.run_dir)) == 4


def test_command_line_resumes_a_killed_run_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distill(run: Path, *arguments: str) -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            return cli.main(["distill", *arguments, f"run_dir={run}"])

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distill(whole, CONFIG, *SHORT) == 0

    class Killed(BaseException):
        """Like SIGKILL, nothing in the package catches it."""

    step, killed_at = Distiller.train_step, [0, 13]

    def killed(self: Distiller) -> torch.Tensor:
        loss = step(self)
        if killed_at and self.step > killed_at[0]:
            del killed_at[0]
            self.checkpoints.writer.close()  # A killed process would not write on in a thread.
            raise Killed
        return loss

    monkeypatch.setattr(Distiller, "train_step", killed)
    often = ["train.checkpoint_every_s=0.000001"]
    with pytest.raises(Killed):
        distill(cut, CONFIG, *SHORT, *often)
    # Killed before its first checkpoint, a run begins again.
    shutil.rmtree(cut / "checkpoints")
    with pytest.raises(Killed):
        distill(cut, str(cut / "config.yaml"), "--resume")
    assert list((cut / "checkpoints").glob("step-*"))
    assert distill(cut, str(cut / "config.yaml"), "--resume") == 0
    students = [load_file(run / "student" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert rows(whole) == rows(cut)


def test_an_interrupt_while_the_warm_up_is_undone_leaves_no_trace(
    make_distiller: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One came between the end of the warm-up and the restoring of batch norms, 1 time in 50."""
    distiller = make_distiller()
    before = {name: b.clone() for name, b in distiller.student.model.named_buffers()}
    real, calls = distiller.student.undo_warm_up, 0

    def interrupted_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        real()

    monkeypatch.setattr(distiller.student, "undo_warm_up", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        distiller.fit()
    assert all(torch.equal(b, before[name]) for name, b in distiller.student.model.named_buffers())
    again = make_distiller(run_dir=distiller.run_dir)
    again.restore()
    assert all(torch.equal(b, before[name]) for name, b in again.student.model.named_buffers())


def signals_at(run: Distiller, step: int, *numbers: int) -> None:
    """Raise signals right after a step, while it is held."""
    train_step = run.train_step

    def signaled() -> torch.Tensor:
        loss = train_step()
        if run.step == step:
            for number in numbers:
                signal.raise_signal(number)
        return loss

    run.train_step = signaled  # type: ignore[method-assign]


def test_a_closed_terminal_saves_and_its_second_signal_changes_nothing(
    make_distiller: Make,
) -> None:
    whole, cut = make_distiller(), make_distiller()
    whole.fit()
    signals_at(cut, 7, signal.SIGHUP, signal.SIGHUP)
    finish = cut.checkpoints.finish

    def saved_while_another_arrives(*args: Any, **kwargs: Any) -> Path:
        signal.raise_signal(signal.SIGHUP)
        return finish(*args, **kwargs)

    cut.checkpoints.finish = saved_while_another_arrives  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = make_distiller(run_dir=cut.run_dir)
    assert again.restore() == (7, [])
    again.fit()
    assert fingerprint(again) == fingerprint(whole)


def test_under_nohup_a_closed_terminal_is_ignored(make_distiller: Make) -> None:
    run = make_distiller()
    signals_at(run, 7, signal.SIGHUP)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run.fit()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert run.step == run.num_steps


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_the_process_even_while_work_is_held(first: int) -> None:
    for only_noted in (False, True):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            with Interrupts(only_noted=only_noted) as interrupts, interrupts.held():
                signal.raise_signal(first)
                if only_noted:  # torchrun's copy of the first one is none
                    signal.raise_signal(signal.SIGTERM)
                    interrupts._first_at = time.monotonic() - 2
                os.write(write, b"1")
                signal.raise_signal(signal.SIGTERM)
                os.write(write, b"2")
            os._exit(0)
        os.close(write)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert os.read(read, 2) == b"1"
        os.close(read)


def test_a_signal_is_served_while_blocks_wait_for_a_disk_that_hangs(make_distiller: Make) -> None:
    run, gate, noted = make_distiller(), threading.Event(), []
    run.checkpoints.writer.submit(gate.wait)  # Four more jobs, and the next block has to wait.
    save = run._save_last

    def saved_last() -> Path:
        noted.append(time.monotonic())
        return save()

    append, starts = run.blocks.append, []

    def first_append() -> None:
        """Let the signals come when training has begun, however long that took."""
        if not starts:
            starts.append(time.monotonic())
            for delay in (0.7, 1.2):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        append()

    run._save_last = saved_last  # type: ignore[method-assign]
    run.blocks.append = first_append  # type: ignore[method-assign]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.fit()
    finally:
        signal.signal(signal.SIGINT, handler)
        gate.set()
    assert noted and noted[0] - starts[0] < 1.2 <= time.monotonic() - starts[0] < 5
    run.checkpoints.writer.close()
