"""What benchmarks/gpu.sh runs on a GPU runs here too: small, on a CPU that answers to cuda."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import render
from benchmarks.fake_cuda import pretended
from benchmarks.gpu import job, summary
from benchmarks.job import imagenet
from benchmarks.parts.ring import captured_step
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """A measurement owns its process; here it does not."""
    owner = torch.backends.cuda.matmul
    before, threads = owner.allow_tf32, torch.get_num_threads()
    yield
    owner.allow_tf32 = before
    torch.set_num_threads(threads)


STEPS = [
    *("kernels", "imagenet", "job", "whole-job", "kd-loss", "pieces", "rivals", "views", "ring"),
    *("cuda-facts", "sampler"),
]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The logs of a rehearsal of gpu.sh, and what it printed."""
    logs = tmp_path_factory.mktemp("gpu")
    environment = os.environ | {"PYTHON": sys.executable, "LOGS": str(logs)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return logs, done.stdout


def rehearsed(rehearsal: tuple[Path, str], step: str) -> dict[str, Any]:
    """The JSON line of a measurement."""
    line = summary.last_line(rehearsal[0] / f"{step}.log")
    assert line is not None and line["environment"]["device"] == "no GPU: rehearsal"
    return line


def check_figures(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float):
                assert math.isfinite(value), row
                assert value > 0 or name.startswith(("share", "gb_per_s", "hours", "gen", "train"))


@pytest.mark.slow
def test_imagenet_leaves_every_row_that_its_table_shows(rehearsal: tuple[Path, str]) -> None:
    line = rehearsed(rehearsal, "imagenet")
    rows = line["rows"]
    check_figures(rows)
    tiny = imagenet.TINY
    made = {(r["steps"], r["arm"]) for r in rows if r["part"] == "sampler"}
    assert made == {
        (k, arm) for k in tiny.steps for arm in ("pipeline fp32", "pipeline half", "ours")
    }
    seen = {(r["student"], r["arm"]) for r in rows if r["part"] == "training"}
    arms = ("published", "eager half", "ours", "ours, networks alone")
    assert seen == {(s, arm) for s in tiny.students for arm in arms}
    assert len([r for r in rows if r["part"] == "outside"]) == 1
    jobs = [r for r in rows if r["part"] == "job, by arithmetic"]
    assert [r["arm"] for r in jobs] == ["published", "eager half", "ours"]
    for row in rows:
        row["environment"] = line["environment"]
    table = render.TABLES["imagenet-gpu"](rows)
    assert table.count("\n| ") == 1 + len(rows) and "no GPU: rehearsal" in table


def test_cost_of_the_job_is_what_the_measured_rates_say() -> None:
    """A call of 4 steps takes 2 s and one of 20 steps 6: 0.25 s a step, 1 s beside them."""
    report = imagenet.Report(bench="imagenet")
    bench = imagenet.Bench(report, imagenet.Settings(students=("resnet18",)), torch.device("cpu"))
    bench.found = {
        ("sampler", "ours", "4"): 32 / 2,
        ("sampler", "ours", "20"): 32 / 6,
        ("training", "ours", "resnet18"): 5000.0,
    }
    bench.job()
    (row,) = report.rows
    assert row["generation_h"] == round(200_000 / 32 * (1 + 100 * 0.25) / 3600, 2)
    assert row["training_h"] == round(200_000 * 100 / 5000 / 3600, 2)
    assert row["hours"] == pytest.approx(row["generation_h"] + row["training_h"], abs=0.011)


def test_full_settings_are_those_of_the_published_models() -> None:
    from benchmarks.parts.sampler_models import dit_flops

    full = imagenet.Settings()
    assert full.image_side == 256 and full.view_size == 224
    assert dit_flops(full.dit) == pytest.approx(237e9, rel=0.01)  # 118.6 G multiply-adds
    assert full.vae["block_out_channels"] == (128, 256, 512, 512)


def test_one_part_that_fails_does_not_lose_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: imagenet.Bench) -> None:
        raise RuntimeError("a broken part")

    def works(bench: imagenet.Bench) -> None:
        bench.report.rows.append({"part": "training"})

    monkeypatch.setattr(imagenet.Bench, "sampler", fails)
    monkeypatch.setattr(imagenet.Bench, "training", works)
    assert imagenet.main(["--tiny"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["rows"] == [{"part": "training"}]
    assert "a broken part" in err


def test_a_time_limit_keeps_the_rows_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_long(bench: imagenet.Bench) -> None:
        bench.report.rows.append({"part": "sampler"})
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(imagenet.Bench, "sampler", too_long)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        imagenet.main(["--tiny"])
    assert signal.getsignal(signal.SIGTERM) is before
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["rows"] == [{"part": "sampler"}]


def test_pretended_graphs_replay_and_waits_and_wrong_calls_are_errors() -> None:
    with pretended():
        x = torch.zeros(3, device="cuda")
        assert x.is_cuda and x.device == torch.device("cuda", 0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x + 1).view(3, 1) * 2
        x.fill_(4)
        graph.replay()
        assert y.tolist() == [[10.0]] * 3
        torch.cuda.set_sync_debug_mode("error")
        for wait in (y.sum().item, y.cpu, x.nonzero, lambda: torch.tensor([1], device="cuda")):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
        torch.cuda.set_sync_debug_mode("default")
        with pytest.raises(TypeError):
            torch.cuda.max_memory_allocated(0, 1)  # type: ignore[call-arg]
    assert not torch.zeros(3).is_cuda


def test_products_in_float16_are_those_in_float32_rounded_also_in_a_graph() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(6, 5)
    layers = tuple(layer.half().requires_grad_(False) for layer in layers)
    inputs = torch.randn(2, 3, 8, 8).half(), torch.randn(7, 6).half()
    with pretended():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        for x in inputs:
            x.mul_(3)
        graph.replay()
    for layer, x, result in zip(layers, inputs, made, strict=True):
        assert torch.equal(result, layer.float()(x.float()).half())


def test_trial_runs_of_a_captured_sampler_are_not_counted() -> None:
    from sampler_cases import dit_sampler

    with pretended(), torch.inference_mode():
        sampler = dit_sampler(count=1, device="cuda")
        next(sampler._module.parameters()).fill_(float("nan"))
        out = torch.empty(10, 4, 8, 8, dtype=torch.uint8, device="cuda")
        sampler.sample(*2 * [torch.arange(10, device="cuda")], out=out)
        assert sampler._graph is not None and sampler.num_made == 12
        assert int(sampler.num_broken) == 12


def test_cpu_tables_do_not_show_rows_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import harness

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    lines = [{"x": i, "environment": {"device": d}} for i, d in enumerate(("CPU a", "NVIDIA b"))]
    (tmp_path / "thing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert [r["x"] for r in render.latest("thing")[0]] == [0]
    assert [r["x"] for r in render.latest("thing-gpu")[0]] == [1]


@pytest.mark.slow
def test_every_line_of_gpu_sh_runs_without_a_gpu(rehearsal: tuple[Path, str]) -> None:
    logs, printed = rehearsal
    assert printed.splitlines()[-2:] == [f"passed: {' '.join(STEPS)}", "failed: none"]
    page = (logs / summary.PAGE).read_text(encoding="utf-8")
    for name in (*STEPS[:3], "pieces", "rivals"):
        assert f"| {name} | ok |" in page
    assert "## rivals" in page and "pipeline, compiled" in page and "s_to_target" in page


@pytest.mark.slow
def test_rivals_pieces_and_jobs_leave_all_their_rows(rehearsal: tuple[Path, str]) -> None:
    rows = rehearsed(rehearsal, "rivals")["rows"]
    check_figures(rows)
    assert {(r["part"], r["arm"]) for r in rows} == {
        ("sampler", "pipeline, compiled"),
        ("sampler", "ours"),
        ("training", "compiled half"),
        ("training", "ours"),
        ("training", "ours, repeatable: false"),
        ("recipe", "pipeline half"),
        ("recipe", "ours"),
    }
    rows = rehearsed(rehearsal, "pieces")["rows"]
    assert {(r["part"], r["piece"]) for r in rows} == {
        *(("ceiling", piece) for piece in ("product", "copy")),
        *(("piece", piece) for piece in ("whole step, one graph", "whole step", "draw", "views")),
        *(("piece", piece) for piece in ("teacher", "student", "loss", "DiT", "decoder")),
        *(("compile", piece) for piece in ("sampler", "step")),
    }
    for row in rows:
        if row.get("piece") in ("whole step", "teacher", "student", "DiT", "decoder"):
            assert row["share_of_product"] > 0, row
    rows = rehearsed(rehearsal, "job")["rows"]
    assert [r["arm"] for r in rows] == ["baseline, half", "ours, cold"]
    assert all(0 < r["top1"] < 1 and r["wall_s"] > 0 for r in rows)


def test_arms_of_the_job_are_scored_after_as_many_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job has 120,000 views, and the baseline 200,000."""
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> None:
        asked.extend(command)
        raise InterruptedError

    monkeypatch.setattr(job.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    with pytest.raises(InterruptedError):
        job._ours("ours, warm", (), tmp_path)
    assert "eval.num_points=12" in asked
    theirs = load_config(DistillConfig, ROOT / "configs" / "many_steps.yaml")
    assert job.evaluations(theirs) == 20


def test_a_step_that_was_not_captured_is_not_timed_as_one_graph() -> None:
    run: Any = SimpleNamespace(device=torch.device("cpu"), train_step=lambda: 1.5, _captured=None)
    assert captured_step(run) == 1.5
    run.device = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="not one CUDA graph"):
        captured_step(run)
    run._captured = object()
    assert captured_step(run) == 1.5


def test_guesses_of_the_steps_fit_into_the_limits_and_are_those_of_the_page() -> None:
    """40 minutes in all and eight for a step, with a second GPU as well."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8").replace("\\\n", "")
    lines = re.findall(r"^ *(?:step|measure) ([\w-]+) (.*)$", script, re.MULTILINE)
    found = {name: re.search(r"# ([\d.]+) min$", line) for name, line in lines}
    assert {name for name, guess in found.items() if guess is None} == {"rivals", "render"}
    guesses = {name: float(guess[1]) for name, guess in found.items() if guess is not None}
    assert set(STEPS) - set(guesses) == {"rivals"} and max(guesses.values()) <= 8
    assert sum(guesses.values()) <= 40
    page = (ROOT / "docs" / "results" / "performance.md").read_text(encoding="utf-8")
    table = page.partition("| step | what | guess, minutes |\n")[2].partition("\n\n")[0]
    shown = re.findall(r"^\| `([\w-]+)` \| .* \| ([\d.]+) \|$", table, re.MULTILINE)
    assert {name: float(guess) for name, guess in shown} == guesses
    assert f"for an H100, {sum(guesses.values()):g} in all" in page


def gpu_sh(tmp_path: Path, python: str, *mode: str, **environment: str) -> tuple[int, list[str]]:
    """Run gpu.sh with a python that is a shell script; return its code and its lines."""
    fake = tmp_path / "python"
    calls = f'echo "$*" >> {tmp_path}/calls\n'
    fake.write_text(f"#!/bin/sh\n{calls}{python}\n", encoding="utf-8")
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *mode],
        env=os.environ | {"PYTHON": str(fake), "LOGS": str(tmp_path / "logs")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_gpu_sh_goes_on_after_a_failure_and_then_skips_what_passed(tmp_path: Path) -> None:
    """With a python that fails where it is asked for the ring."""
    broken = 'case "$*" in *" ring"*) exit 3;; esac'
    code, lines = gpu_sh(tmp_path, broken, "--rehearse")
    assert code == 1 and any("FAILED (3)" in line for line in lines)
    others = " ".join(name for name in STEPS if name != "ring")
    assert lines[-2:] == [f"passed: {others}", "failed: ring"]
    (tmp_path / "calls").unlink()
    code, lines = gpu_sh(tmp_path, "", "--rehearse")
    assert code == 0 and lines[-1] == "failed: none"
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert len(calls) == 2 and " ring " in calls[0] and "gpu-summary" in calls[1]
    wrong = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--recrod"]
    again = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "usage" in again.stderr


def test_gpu_sh_limits_each_step_and_leaves_the_rest_when_time_is_up(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    limit = programs / "timeout"
    limit.write_text(f"#!/bin/sh\necho $2 >> {tmp_path}/limits\n", encoding="utf-8")
    limit.chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    assert gpu_sh(tmp_path, "", "--rehearse", **path)[0] == 0
    limits = (tmp_path / "limits").read_text(encoding="utf-8").split()
    assert limits == ["900" if name == "pieces" else "480" for name in STEPS]
    again = tmp_path / "again"
    again.mkdir()
    code, lines = gpu_sh(again, "", "--rehearse", BUDGET_S="10", **path)
    assert code == 1 and lines[-1] == f"left for the next start: {' '.join(STEPS)}"


def test_gpu_sh_starts_a_failed_job_of_two_gpus_again_in_an_empty_folder(tmp_path: Path) -> None:
    """`dmkd` refuses a folder with files of another run."""
    folder = tmp_path / "logs" / "two-gpus-run"
    cases = f"*device_count*) echo 2;; *two-gpus-run*) mkdir {folder} && exit 5;;"
    for _ in range(2):
        code, lines = gpu_sh(tmp_path, f'case "$*" in {cases} esac')
        assert code == 1 and lines[-1] == "failed: two-gpus"
        assert any("FAILED (5)" in line for line in lines)


def test_summary_has_steps_state_of_the_gpu_figures_and_goals(tmp_path: Path) -> None:
    (tmp_path / "steps.txt").write_text("kd-loss\tok\t12\nring\tFAILED (1)\t3\n")
    state = {"driver_version": "580.1", "power.limit": "700", "other_processes": 2}
    stamp = {"device": "GPU", "torch": "2", "python": "3", "commit": "c", "date": "d", "gpu": state}
    line = {
        "bench": "kd-loss",
        "rows": [{"shape": "8x8", "arm": "ours", "share_of_copy": 0.5}],
        "goals": {"share": {"value": 0.5, "goal": 0.6, "met": False}},
        "environment": stamp,
    }
    (tmp_path / "kd-loss.log").write_text(f"noise\n{json.dumps(line)}\n")
    (tmp_path / "ring.log").write_text("Traceback\n")
    assert summary.main([str(tmp_path)]) == 0
    page = (tmp_path / summary.PAGE).read_text()
    for text in (
        "| kd-loss | ok | 12 s |",
        "| ring | FAILED (1) | 3 s |",
        "| 8x8, ours | share_of_copy 0.5 |",
        "- MISSED: share: 0.5, goal 0.6",
        "- power.limit: 700",
        "other_processes 2",
    ):
        assert text in page
