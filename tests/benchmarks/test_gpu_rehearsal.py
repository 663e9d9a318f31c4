"""What benchmarks/gpu.sh runs on a GPU runs here too: small, on a CPU that answers to cuda."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import render
from benchmarks.fake_cuda import pretended
from benchmarks.job import imagenet

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """A measurement owns its process; here it does not."""
    owner = torch.backends.cuda.matmul
    before, threads = owner.allow_tf32, torch.get_num_threads()
    yield
    owner.allow_tf32 = before
    torch.set_num_threads(threads)


def rehearsed(*arguments: str) -> dict[str, Any]:
    """The JSON line of a measurement."""
    command = [sys.executable, "-m", "benchmarks.fake_cuda", "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert line["environment"]["device"] == "no GPU: rehearsal"
    return line


def check_figures(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float):
                assert math.isfinite(value), row
                assert value > 0 or name.startswith(("share", "gb_per_s", "hours", "gen", "train"))


@pytest.mark.slow
def test_imagenet_leaves_every_row_that_its_table_shows() -> None:
    line = rehearsed("imagenet", "--tiny")
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
def test_every_line_of_gpu_sh_runs_without_a_gpu() -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    script = str(ROOT / "benchmarks" / "gpu.sh")
    done = subprocess.run(
        ["bash", script, "--rehearse"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "passed: kernels whole-job imagenet kd-loss views ring cuda-facts sampler",
        "failed: none",
    ]


def test_gpu_sh_goes_on_after_a_failure_and_says_so(tmp_path: Path) -> None:
    """With a python that fails where it is asked for the ring."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *" ring"*) exit 3;; esac\n', encoding="utf-8")
    fake.chmod(0o755)
    script = str(ROOT / "benchmarks" / "gpu.sh")
    done = subprocess.run(
        ["bash", script, "--rehearse"],
        env=os.environ | {"PYTHON": str(fake)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED (3)" in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "passed: kernels whole-job imagenet kd-loss views cuda-facts sampler",
        "failed: ring",
    ]
    wrong = ["bash", script, "--recrod"]
    again = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "usage" in again.stderr
