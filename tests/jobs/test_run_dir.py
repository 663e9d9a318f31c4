"""Run directories: one process at a time, a name of its own for each run, whole files only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_os import FailingOs
from small_jobs import CONFIG, SHORT

from dmkd_fast import Distiller, cli
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import distill as distill_job
from dmkd_fast.jobs import run_dir
from dmkd_fast.jobs.report import images as report_images
from dmkd_fast.runtime import files
from dmkd_fast.runtime.distributed import Ranks
from dmkd_fast.runtime.errors import UserError

BUSY = "another process uses"


def holder(folder: Path) -> int:
    """A process that holds the lock of a run directory until it is killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with run_dir.locked(folder):
            os.write(write, b"!")
            time.sleep(60)
        os._exit(1)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_run_directory_has_one_process_until_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid = holder(folder)
    try:
        with pytest.raises(UserError, match=BUSY), run_dir.locked(folder):
            pytest.fail("entered beside another process")
    finally:
        end(pid)
    for _ in range(2):
        with run_dir.locked(folder):
            pass


def test_restarted_ranks_wait_for_the_lock_of_their_predecessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, pid = Ranks(restarts=1), holder(tmp_path)
    monkeypatch.setattr(run_dir, "RESTART_WAIT_S", 0.2)
    with pytest.raises(UserError, match=BUSY), run_dir.locked(tmp_path, ranks=again):
        pytest.fail("entered beside another process")
    monkeypatch.setattr(run_dir, "RESTART_WAIT_S", 30)
    if (killer := os.fork()) == 0:
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    start = time.monotonic()
    with run_dir.locked(tmp_path, ranks=again):
        assert 0.2 < time.monotonic() - start < 10
    os.waitpid(killer, 0)
    os.waitpid(pid, 0)


def test_a_file_system_without_locks_is_logged_and_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_dir.locked(tmp_path):
        assert "cannot lock files (No locks available)" in caplog.text


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_start_and_a_resume_beside_a_living_run_are_refused(
    resume: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = load_config(DistillConfig, CONFIG, [*SHORT, f"run_dir={run}"])
    pid = holder(run)
    if resume:
        run_dir.claim(config)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = [str(run / "config.yaml"), "--resume"] if resume else [CONFIG, *SHORT]
    try:
        assert cli.main(["distill", *command, f"run_dir={run}"]) == 2
    finally:
        end(pid)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dmkd:")]
    assert len(lines) == 1 and BUSY in lines[0]
    now = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    del before[run / ".lock"], now[run / ".lock"]
    assert now == before


def test_pretraining_locks_its_directory_too(tmp_path: Path) -> None:
    config = load_config(DistillConfig, CONFIG, [f"run_dir={tmp_path / 'run'}"])
    pid = holder(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=BUSY), run_dir.opened(config, resume=False):
            pytest.fail("entered beside another process")
    finally:
        end(pid)
    with run_dir.opened(config, resume=False) as folder:
        assert (folder / "config.yaml").is_file()
        with pytest.raises(UserError, match=BUSY), run_dir.opened(config, resume=True):
            pytest.fail("entered twice")
    # The second refusal is for a run that began between a start and its lock.
    for refuse in (run_dir.check_new, run_dir.claim):
        with pytest.raises(UserError, match="holds a run already"):
            refuse(config)


def test_runs_started_together_get_different_names() -> None:
    config = load_config(DistillConfig, CONFIG, [])
    assert len({run_dir.name_new(config).run_dir for _ in range(100)}) == 100


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("''", "expected at least 1 character"),
        ("'  '", "expected the path"),
        ("{tmp}/" + "x" * 300, "File name too long"),
        ("{tmp}/file", ""),
        ("{tmp}/file/run", ""),
        ("{tmp}/closed", "Permission denied"),
    ],
)
def test_a_directory_that_cannot_be_used_is_one_line(
    name: str,
    words: str,
    resume: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    stat = Path.stat

    def closed(path: Path, **options: Any) -> os.stat_result:  # root may enter every folder
        if path.parent.name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", closed)
    monkeypatch.setattr(Path, "exists", lambda path: bool(_stat_or_none(path)))
    arguments = [CONFIG, f"run_dir={name.replace('{tmp}', str(tmp_path))}"]
    assert cli.main(["distill", *arguments, *(["--resume"] if resume else SHORT)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dmkd: ") and words in lines[0], lines
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def _stat_or_none(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def test_a_new_folder_shows_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "student"
    for number in range(2):
        with files.new_folder(final) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "weights").write_text(str(number))
            assert final.exists() == bool(number)
        assert (final / "inner" / "weights").read_text() == str(number)

    class Killed(BaseException):
        pass

    def write_half() -> None:
        with files.new_folder(final) as partial:
            (partial / "weights").write_text("half")
            raise Killed

    with pytest.raises(Killed):
        write_half()
    assert (final / "inner" / "weights").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = torch.zeros(2, 2, 1, 8, 8, dtype=torch.uint8), tmp_path / "samples.png"
    report_images.grid(images, ["a", "b"], path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    monkeypatch.setattr(files, "os", FailingOs(1, errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: .*samples\.png"):
        report_images.grid(images + 9, ["a", "b"], path)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"] and path.read_bytes() == before


@pytest.mark.parametrize("at", [0, 20])
def test_a_disk_that_fills_after_training_is_one_line_and_a_resume_ends_the_job(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit: Callable[[Distiller], Any] = Distiller.fit
    run = tmp_path / "run"

    def on_a_disk_that_fills(distiller: Distiller) -> Any:
        totals = fit(distiller)
        monkeypatch.setattr(files, "os", FailingOs(at, errno.ENOSPC))
        return totals

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "fit", on_a_disk_that_fills)
        assert cli.main(["distill", CONFIG, *SHORT, f"run_dir={run}"]) == 2
    monkeypatch.setattr(files, "os", os)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"dmkd: {run}") and "No space left on device" in line
    assert f"dmkd distill {run}/config.yaml --resume" in line
    assert not (run / "summary.json").exists()
    assert cli.main(["distill", str(run / "config.yaml"), "--resume"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert sorted(p.name for p in (run / "student").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_results_are_written_says_how_to_go_on(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), run_dir.writing_results(tmp_path, "run: it --resume"):
        signal.raise_signal(number)
    line = "training is finished and saved; to write its results, run: it --resume\n"
    assert capsys.readouterr().err == line
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("has_ended", [True, False])
def test_rank_0_alone_says_whether_a_run_has_ended(
    has_ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others know the settings of the command alone, whose length may be another."""
    told = ["0", json.dumps([str(tmp_path), True]), "ended" if has_ended else ""]

    class SecondOfTwo(Ranks):
        def gather(self, text: str) -> list[str]:
            return [told.pop(0), text]

    def load(*_: object) -> None:
        raise UserError("it goes on")

    monkeypatch.setattr(run_dir, "find", lambda config: config)
    monkeypatch.setattr(run_dir, "finished", lambda _: None if has_ended else {"views": 1})
    monkeypatch.setattr(distill_job, "prepare", load)
    ranks = SecondOfTwo(rank=1, world_size=2, local_world_size=2)
    run = [f"run_dir={tmp_path}"]
    if has_ended:
        assert distill_job.run(CONFIG, run, resume=True, show=False, ranks=ranks) == {}
    else:
        with pytest.raises(UserError, match="it goes on"):
            distill_job.run(CONFIG, run, resume=True, show=False, ranks=ranks)
    assert told == []


def test_a_disk_that_is_full_before_training_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch.utils.tensorboard

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.tensorboard, "SummaryWriter", full)
        assert cli.main(["distill", CONFIG, *SHORT, f"run_dir={run}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"dmkd: {run}: cannot write statistics (No space left on device)")
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", FailingOs(0, errno.ENOSPC))
        assert cli.main(["distill", CONFIG, *SHORT, f"run_dir={tmp_path / 'other'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dmkd: run_dir: cannot write to") and "No space left" in line


def test_a_run_that_was_moved_resumes_where_it_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, old, new = Distiller.train_step, tmp_path / "old", tmp_path / "new name"

    def interrupted(distiller: Distiller) -> torch.Tensor:
        if distiller.step == 7:
            raise KeyboardInterrupt
        return step(distiller)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "train_step", interrupted)
        assert cli.main(["distill", CONFIG, *SHORT, f"run_dir={old}"]) == 130
    said = capsys.readouterr().err
    assert f"to go on: dmkd distill {old}/config.yaml --resume" in said
    old.rename(new)
    assert run_dir.resume_command(new) == f"dmkd distill '{new}/config.yaml' --resume"
    assert cli.main(["distill", str(new / "config.yaml"), "--resume"]) == 0
    captured = capsys.readouterr()
    assert f"{new}: going on at step 7 of 20" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["run_dir"] == str(new)
    assert (new / "student" / "model.safetensors").is_file() and not old.exists()


def test_the_folder_of_a_config_is_that_of_the_run_if_a_run_lies_there(tmp_path: Path) -> None:
    config = load_config(DistillConfig, CONFIG, [f"run_dir={tmp_path / 'old'}"])
    saved = run_dir.claim(config) / "config.yaml"

    def folder(overrides: list[str] | None = None, *, resume: bool = True) -> str:
        return run_dir.load(DistillConfig, saved, overrides or [], resume=resume).run_dir

    copied = tmp_path / "copied"
    copied.mkdir()
    saved = saved.rename(copied / "config.yaml")
    assert folder() == config.run_dir  # a config of that name, but nothing of a run
    (copied / ".lock").touch()
    assert folder() == str(copied) and folder(resume=False) == config.run_dir
    assert folder(["run_dir=other"]) == "other"
    saved = saved.rename(copied / "job.yaml")
    assert folder() == config.run_dir
