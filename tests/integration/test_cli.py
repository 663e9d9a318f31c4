"""The command line: whole short runs, and one line for every mistake."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_line
from safetensors.torch import load_file
from small_jobs import CONFIG, SHORT

import dmkd_fast
from dmkd_fast import cli

FMNIST = "embedded:fashion_mnist"


def dmkd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dmkd_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a command in this process and return the JSON that it prints last."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.slow
def test_distill_leaves_a_complete_run_that_evaluate_reproduces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = dmkd("distill", CONFIG, f"run_dir={tmp_path}/a", *SHORT)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary) == [
        "top1",
        "top5",
        "teacher_top1",
        "agreement",
        "generated_images",
        "views",
        "reuse",
        "images_per_s",
        "views_per_s",
        "wall_s",
        "cpu_s",
        "attention",
        "denoiser_license",
        "teacher_license",
        "run_dir",
    ]
    assert summary["views"] == 640 and summary["generated_images"] == 192
    assert 0 <= summary["top1"] <= summary["top5"] <= 1
    run = tmp_path / "a"
    pictures, student = (
        ("samples.png", "report.html", "report.json"),
        ("model.safetensors", "config.json", "README.md"),
    )
    names = ["config.yaml", "stats.jsonl", "summary.json", *pictures]
    for name in [*names, *(f"student/{n}" for n in student)]:
        assert (run / name).stat().st_size > 0, name
    assert list(run.glob("events.out.tfevents*"))
    assert "views/s" in done.stderr and "ETA" in done.stderr

    scores = printed(capsys, "evaluate", str(run))
    assert {k: scores[k] for k in ("top1", "top5", "agreement")} == {
        k: summary[k] for k in ("top1", "top5", "agreement")
    }

    printed(capsys, "distill", f"{run}/config.yaml", f"run_dir={tmp_path}/b")
    first, second = (load_file(tmp_path / r / "student" / "model.safetensors") for r in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dry_run_prints_settings_and_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", CONFIG, "--dry-run", "sampler.num_steps=3"]) == 0
    out = capsys.readouterr().out
    assert (
        "num_steps: 3" in out and "device: cpu" in out and "ring images: " in out and "bytes" in out
    )
    assert not list(tmp_path.iterdir())


def test_help_names_only_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-h"], ["distill", "-h"], ["evaluate", "-h"], ["pretrain", "teacher", "-h"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "section.field=value" in out and "--resume" in out
    verbs = [
        line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "
    ]
    shown = ["demo", "init", "distill", "generate", "evaluate", "predict", "export", "import"]
    assert [v for v in verbs if v.islower()][:8] == shown


def test_help_and_config_do_not_wait_for_pytorch() -> None:
    script = textwrap.dedent(
        """
        import sys
        from dmkd_fast import cli
        try:
            code = cli.main(sys.argv[1:])
        except SystemExit as stop:
            code = stop.code
        names = ("torch", "pydantic", "yaml", "numpy")
        print("imported:", *(name for name in names if name in sys.modules))
        sys.exit(code)
        """
    )
    for arguments, allowed in (
        (["--help"], ""),
        (["distill", "--help"], ""),
        (["--version"], ""),
        ([], ""),
        (["config", "ring"], "pydantic yaml"),
    ):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].split()[1:] == allowed.split(), arguments


def test_bare_command_prints_help_and_version_is_the_packages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: dmkd [-h] [--version] VERB")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dmkd {dmkd_fast.__version__}\n"
    done = dmkd("--version")  # python -m dmkd_fast
    assert done.stdout == f"dmkd {dmkd_fast.__version__}\n" and done.returncode == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(["--bare"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("dmkd: unrecognized arguments: --bare")


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", CONFIG, "seed=-1"],
        ["generate", CONFIG, "--out", "x", "--num-images", "1", "seed=-1"],
        ["evaluate", "nowhere"],
        ["pretrain", "fewstep", CONFIG],
        ["config", "nothing"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_traceback_shows_where_a_user_error_was_raised(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert cli.main([*arguments, "--traceback"]) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):" and last == line


def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(_: object) -> None:
        raise ValueError("a bug, not a wrong setting")

    monkeypatch.setattr(cli.verbs, "distill", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["distill", CONFIG])
    assert capsys.readouterr().err == ""


def test_warnings_of_the_package_are_printed_by_the_command_line_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("dmkd_fast")
    monkeypatch.setattr(cli.verbs, "distill", lambda _: logger.warning("a slow path"))
    for _ in range(2):
        assert logger.handlers == []
        assert cli.main(["distill", CONFIG]) == 0
        assert capsys.readouterr().err == "WARNING: a slow path\n"
    assert logger.handlers == []


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_interrupt_saves_within_five_seconds_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "dmkd_fast",
        "distill",
        CONFIG,
        f"run_dir={run}",
        *SHORT,
        "train.num_views=64000",
    ]
    # A job started in the background of a shell ignores SIGINT unless it is told not to.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "views/s" in line:
            break
    process.send_signal(number)
    start = time.monotonic()
    rest = process.stderr.read()
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - start < 5
    assert f"dmkd distill {run}/config.yaml --resume" in rest
    saved = list((run / "checkpoints").glob("step-*"))
    assert len(saved) == 1

    tensors = saved[0] / "state.safetensors"
    intact = tensors.read_bytes()
    tensors.write_bytes(intact[:-1] + b"?")
    assert cli.main(["distill", f"{run}/config.yaml", "--resume"]) == 2
    one_line(capsys, ["SHA-256"])
    tensors.write_bytes(intact)

    step = int(saved[0].name.removeprefix("step-"))
    # Finish quickly: only the length is changed, in the saved settings.
    text = (run / "config.yaml").read_text()
    text = text.replace("num_views: 64000", f"num_views: {32 * (step + 3)}")
    (run / "config.yaml").write_text(text)
    summary = printed(capsys, "distill", f"{run}/config.yaml", "--resume")
    assert summary["views"] == 32 * (step + 3)


@pytest.mark.slow
def test_no_real_training_image_is_opened(tmp_path: Path) -> None:
    """A decoy training set lies where one would look; every opened file is on the allow-list."""
    decoy = tmp_path / "data" / "fashion-mnist"
    decoy.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (decoy / name).write_bytes(b"decoy")
        os.utime(decoy / name, (1, 1))
    probe = tmp_path / "probe"
    probe.write_bytes(b"probe")
    os.utime(probe, (1, 1))
    script = textwrap.dedent(
        """
        import os, site, sys, tempfile
        opened = []
        sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
        from dmkd_fast import assets, cli
        code = cli.main(sys.argv[1:])
        package = os.path.dirname(os.path.dirname(os.path.abspath(assets.__file__)))
        data = [str(assets.ROOT / "fashion_mnist" / n) for n in ("test", "weak", "denoiser")]
        home = os.path.expanduser("~")
        system = [sys.prefix, sys.base_prefix, *site.getsitepackages(), "/proc", "/sys", "/dev",
                  "/usr", "/lib", "/etc", "/opt", "/var/lib", tempfile.gettempdir(),
                  home + "/.cache", home + "/.config"]
        run = next(a for a in sys.argv if a.startswith("run_dir=")).removeprefix("run_dir=")
        config = sys.argv[2]
        paths = {os.path.abspath(os.fsdecode(p)) for p in opened if isinstance(p, (str, bytes))}
        code_files = (".py", ".pyc", "manifest.json")
        odd = {p for p in paths if p.startswith(str(assets.ROOT)) and os.path.isfile(p)
               and not p.startswith(tuple(data)) and not p.endswith(code_files)}
        own = lambda p: p.startswith((package, run)) or p in (config, os.path.dirname(run))
        odd |= {p for p in paths if not own(p) and not p.startswith(tuple(system))}
        odd |= {p for p in paths if "train-images" in p or "train-labels" in p}
        assert not odd, odd
        assert any("t10k-images" in p for p in paths)
        sys.exit(code)
        """
    )
    command = [sys.executable, "-c", script, "distill", CONFIG, f"run_dir={tmp_path}/run", *SHORT]
    command.append("eval.path=embedded:fashion_mnist/test")
    (tmp_path / "scratch").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "scratch")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    probe.read_bytes()
    if probe.stat().st_atime > 1:  # The file system records reads, so C code is seen as well.
        for name in decoy.iterdir():
            assert name.stat().st_atime == 1, name


@pytest.mark.parametrize(("missing", "code"), [("pydantic", 2), ("yaml", 2)])
def test_a_core_install_says_in_one_line_what_the_command_needs(missing: str, code: int) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from dmkd_fast.cli import main; "
        "sys.exit(main(['distill', 'x.yaml', '--dry-run']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "pip install 'dmkd_fast[distill]'" in done.stderr
    assert done.stderr.count("\n") == 1
