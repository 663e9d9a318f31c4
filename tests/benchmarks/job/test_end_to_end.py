"""The paper's way is what it says it is, and so is every change between it and ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import harness, render
from benchmarks.harness import CONFIGS
from benchmarks.job import arms, baseline, end_to_end, ladder
from benchmarks.job.arms import (
    ARMS,
    BF16,
    CHANNELS_LAST,
    COMPILED,
    DEFAULT,
    EQUAL,
    FEW_STEPS,
    IMAGES,
    OUR_RECIPE,
    TARGET,
    Study,
)
from benchmarks.job.end_to_end import PARTS
from benchmarks.job.ladder import Recipe, Trainer
from benchmarks.parts.sampler_models import diffusers_dit
from dmkd_fast import (
    DiffusionSampler,
    Distiller,
    Guidance,
    ImageSet,
    InputSpec,
    Steps,
    kd_loss,
    load_denoiser,
    load_idx,
)
from dmkd_fast.assets import resolve

ROOT = Path(__file__).parents[3]
DENOISER = "embedded:fashion_mnist/denoiser"
SMALL = (
    "sampler.micro_batch_images=64",
    "ring.capacity_images=192",
    "ring.min_fill_images=64",
    "train.num_views=256",
    "train.batch_size=64",
)
SIZES = ("--images", "64", "--views", "128", "--points", "1", "--seeds", "1")
STUDY = Study(num_images=64, num_views=128, num_points=1, overrides=SMALL)
# These two train as the arm before them: with images of our sampler, with settings of our job.
RECIPES = {
    name: arm.recipe
    for name, arm in ARMS.items()
    if arm.recipe is not None and name not in ("lean sampler", OUR_RECIPE)
}


def test_diffusers_loop_makes_the_images_of_our_sampler() -> None:
    folder = resolve(DENOISER)
    loaded = load_denoiser(folder, torch.device("cpu"))
    sampler = DiffusionSampler(
        loaded, Steps(count=8, solver="dpm++2m"), Guidance(scale=1.5), micro_batch_images=8
    )
    ids = torch.arange(8)
    ours = sampler.sample(ids, ids, out=torch.empty(8, 1, 28, 28, dtype=torch.uint8))
    theirs = baseline.make_images(
        diffusers_dit(folder), sampler._noise(ids, 0), ids, num_steps=8, guidance_scale=1.5, batch=4
    )
    gap = (ours.int() - theirs.int()).abs().float()
    # Their noise levels start at 0.999 instead of 1, and their timesteps are whole numbers.
    assert gap.mean() < 1 and gap.quantile(0.99) < 10
    assert (ours.int() - theirs.roll(1, 0).int()).abs().float().mean() > 20


def test_png_files_come_back_as_the_jobs_views(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(30) % 10
    baseline.write_pngs(images, labels, tmp_path / "pngs")
    config = STUDY.load(EQUAL)
    spec = InputSpec(size=28, mean=(0.286,), std=(0.353,))
    batches = baseline.png_batches(
        tmp_path / "pngs", config.views, spec, batch=30, workers=0, seed=0
    )
    black = (0 - 0.286) / 0.353
    canvas = torch.nn.functional.pad((images / 255 - 0.286) / 0.353, (2,) * 4, value=black)
    places = set()
    views, found = next(batches)
    for view, label in zip(views, found.tolist(), strict=True):
        hits = [
            (n, top, left)
            for n in range(label, 30, 10)
            for top in range(5)
            for left in range(5)
            if torch.allclose(canvas[n, :, top : top + 28, left : left + 28], view, atol=1e-5)
        ]
        assert len(hits) == 1
        places.add(hits[0])
    assert {n for n, _, _ in places} == set(range(30))  # an epoch has each image once
    for axis in (1, 2):  # crops reach everywhere in a border of two
        assert {place[axis] for place in places} == set(range(5))


def test_eager_loss_is_kd_loss() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(16, 10, requires_grad=True), 3 * torch.randn(16, 10)
    losses = [
        f(student, teacher)
        for f in (
            lambda s, t: baseline.kd_loss(s, t, 4.0),
            lambda s, t: kd_loss(s, t, temperature=4.0),
        )
    ]
    eager, fused = (torch.autograd.grad(loss, student)[0] for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(eager, fused, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(teacher_graph=True),
        Recipe(fused_loss=True, reads_each_step=False),
        Recipe(fused_loss=True, folded_teacher=True),
    ],
    ids=["plain", "teacher's graph", "fused loss", "folded teacher"],
)
def test_three_steps_are_those_of_our_trainer(
    make_distiller: Callable[..., Distiller], recipe: Recipe
) -> None:
    # SGD, because Adam turns the rounding noise of gradients that are zero into full steps.
    settings = {"name": "sgd", "lr": 0.02, "ema_decay": 0.9}
    ours, other = make_distiller(**settings), make_distiller(**settings)
    trainer = Trainer(
        deepcopy(ours.student.model),
        deepcopy(ours.targets.teachers),
        recipe,
        schedule=ours.schedule,
        temperature=4.0,
        input=InputSpec(size=8, mean=(0.5,), std=(0.5,)),
    )
    for distiller in (ours, other):
        distiller.refill()
    for _ in range(3):
        draw = other.ring.sample(16)
        views = other.targets.views(other.ring.images, draw.indices, draw.ids, draw.uses)
        trainer.step(views, other.ring.labels[draw.indices])
        ours.train_step()
    moved = 0.0
    pairs = [
        (trainer.student, ours.student.model),
        (trainer.average.module, ours.student.average.module),
    ]
    for theirs, mine in pairs:
        for a, b, start in zip(
            theirs.state_dict().values(),
            mine.state_dict().values(),
            other.student.model.state_dict().values(),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            moved = max(moved, float((b - start).abs().max()))
    assert moved > 1e-3
    grads = [p.grad is not None for p in trainer.teacher.parameters()]
    assert all(grads) if recipe.teacher_graph else not any(grads)


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation on 100 real images instead of 10,000."""
    real = load_idx(resolve("embedded:fashion_mnist/test"), "t10k")
    few = ImageSet(images=real.images[:100], labels=real.labels[:100], class_names=real.class_names)
    monkeypatch.setattr(ladder, "open_test_set", lambda *_: few)
    monkeypatch.setattr(ladder, "TRIAL_STEPS", 1)
    # What tests before this one have allocated and set cannot be undone in this process.
    monkeypatch.setattr(ladder, "keeps_freed_memory", lambda: False)
    counters.clear()


@pytest.mark.slow
def test_kept_memory_is_seen_in_a_process_of_its_own() -> None:
    code = (
        "from benchmarks.job.ladder import keeps_freed_memory as kept; "
        "from dmkd_fast.runtime import device; "
        "before = kept(); device.keep_freed_memory(); print(before, kept())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# Kept memory cannot be undone in this process, and compiling takes a minute.
@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in (TARGET, "images in a ring") else pytest.mark.slow)
        for n, r in RECIPES.items()
        if not r.keeps_memory
    ],
)
def test_a_change_is_seen_in_the_run_that_makes_it(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(64) % 10
    if not recipe.ring:
        baseline.write_pngs(images, labels, tmp_path / "pngs")
    config = replace(STUDY, num_views=64).load(EQUAL).model_copy(update={"num_threads": 1})
    pngs = None if recipe.ring else tmp_path / "pngs"
    # It raises where the run did not do what the recipe says.
    found = ladder.train(recipe, config, images=images, labels=labels, pngs=pngs)
    assert found["views"] == 64 and len(found["curve"]) == 1
    assert found["wall_s"] > found["training_s"] > 0
    # The same run would not pass for any other recipe.
    for other in {*RECIPES.values()} - {recipe}:
        assert ladder.contradictions(other, found["proof"], num_images=64), other


def test_settings_are_equal_where_they_should_be() -> None:
    study = Study(num_images=4096, num_views=60_000, num_points=12)
    equal, few, default = map(study.load, (EQUAL, FEW_STEPS, DEFAULT))
    for part in ("teacher", "student", "loss"):
        assert getattr(equal, part) == getattr(default, part)
    assert (equal.views.size, equal.views.pad, default.views.pad) == (default.views.size, 2, 1)
    assert (equal.optim.name, default.optim.name) == ("adamw", "muon") and not equal.more_teachers
    assert (equal.sampler.solver, equal.sampler.num_steps) == ("dpm++2m", 8)
    assert equal.ring.min_fill_images == 4096
    # 938 steps of 64 views: no image is made after the first view.
    assert equal.ring.samples_per_insert * 4096 >= 938 * 64
    assert default.train.num_views == 120_000 and default.eval.num_points == 24
    # The few-step denoiser is all that its arm adds, and the recipe all that the default adds.
    for part in ("views", "teacher", "more_teachers", "student", "loss", "optim", "train", "eval"):
        assert getattr(few, part) == getattr(equal, part)
    assert (few.denoiser, few.sampler) == (default.denoiser, default.sampler)
    assert study.load(ARMS[OUR_RECIPE].trains_like) == default


@pytest.mark.parametrize("name", ["many_steps", "fashion_mnist"])
def test_a_part_made_before_a_config_changed_is_of_another_study(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = STUDY.facts()
    changed = shutil.copytree(CONFIGS, tmp_path / "configs") / f"{name}.yaml"
    changed.write_text(changed.read_text().replace("temperature: 4.0", "temperature: 5.0"))
    monkeypatch.setattr(arms, "CONFIGS", changed.parent)
    assert STUDY.facts() != before


def made_up(work: Path, study: Study) -> Callable[..., Any]:
    """In place of subprocess.run: figures that are easy to check by hand."""
    started: list[str] = []
    facts = study.facts()

    def run(command: list[str], **_: Any) -> None:
        name = command[-1]
        if len(started) == 6:
            started.append("stopped")
            raise KeyboardInterrupt
        started.append(name)
        spent = {"wall_s": 10.0, "cpu_s": 15.0}
        found: dict[str, Any] = {"peak_memory_mib": 100.0, "disk_mib": 2.0, "num_images": 64}
        if name in IMAGES:
            slow = 10.0 if "diffusers" in name else 1.0
            found |= {
                part: {k: v * slow for k, v in spent.items()}
                for part in ("setup", "images", "pngs")
            }
            found["proof"] = {"sampler": name, "attention": "sdpa", "sampler_dtype": "float32"}
        else:
            speeds = {TARGET: 1.0, BF16: 1.5, CHANNELS_LAST: 2.0, EQUAL: 4.0, DEFAULT: 8.0}
            speed = speeds.get(name, 3.0)
            top1 = {"fused loss": 0.5}.get(name, 0.8)
            curve = [
                (60 / speed, 0.7, 1.0),
                (120 / speed, top1 - 0.005, 2.0),
                (180 / speed, top1, 3.0),
            ]
            found |= {
                "wall_s": 200 / speed,
                "cpu_s": 300.0,
                "views": 128,
                "curve": curve,
                "generation_s": 10.0,
                "training_s": 5.0,
                "evaluation_s": 3.0,
                "proof": {
                    "ops": {"aten::topk": 1},
                    "png_files": 64,
                    "teacher_batch_norms": 19,
                    "page_faults_per_step": 7,
                    "compiled_graphs": 0,
                },
            }
        part = command[command.index("--part") + 1]
        path = arms.part_file(work / part, study.seed, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"study": facts, "commit": "abc", **found}))

    run.started = started  # type: ignore[attr-defined]
    return run


def test_a_stopped_study_goes_on_and_compares_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up(tmp_path, STUDY)
    monkeypatch.setattr(end_to_end.subprocess, "run", run)
    monkeypatch.setattr(end_to_end.Report, "finish", lambda self, record: reports.append(self))
    reports: list[Any] = []
    whole, steps = (["--part", part, *SIZES, "--work", str(tmp_path), *SMALL] for part in PARTS)

    def both() -> None:
        end_to_end.main(whole)
        end_to_end.main(steps)

    with pytest.raises(KeyboardInterrupt):
        both()
    both()
    started = [name for name in run.started if name != "stopped"]  # type: ignore[attr-defined]
    steps_images = [name for name in IMAGES if "compiled" not in name]
    assert started == [*IMAGES[:3], *PARTS["whole"].arms, *steps_images, *PARTS["ladder"].arms]

    rows = {row["arm"]: row for report in reports[-2:] for row in report.rows}
    assert set(rows) == set(ARMS)
    base, ring = rows[TARGET], rows["images in a ring"]
    # Loading, images and files of 100 s each, then training.
    assert base["wall_s"] == 500 and base["generation_s"] == 200 and base["png_s"] == 100
    assert base["cpu_s"] == 750 and base["disk_mib"] == 2
    assert base["target"] == 0.795 and base["s_to_target"] == 300 + 120
    assert base["s_to_target_without_evaluations"] == 300 + 118
    assert ring["wall_s"] == round(20 + 200 / 3, 1) and ring["disk_mib"] == ring["png_s"] == 0
    assert rows["fused loss"]["s_to_target"] is None
    assert rows["fused loss"]["times_faster_than_fp32"] is None
    assert rows[EQUAL]["s_to_target"] == 30 and rows[EQUAL]["times_faster_than_fp32"] == 14
    # Of 360 s without and 340 s with compilation the faster counts.
    assert rows[COMPILED]["s_to_target"] == 340 and rows[CHANNELS_LAST]["s_to_target"] == 360
    assert rows[EQUAL]["times_faster_than_bf16"] == round(340 / 30, 2)
    assert rows[CHANNELS_LAST]["resolution_s"] == 30
    carried = [[r["arm"] for r in x.rows if r["generation_carried_over"]] for x in reports[-2:]]
    assert carried[0] == [OUR_RECIPE] and len(carried[1]) == 9
    assert {TARGET, ring["arm"]} < set(carried[1])
    assert [goal.met for goal in reports[-2].goals.values()] == [True, True]

    for row in rows.values():
        row["environment"] = {"device": "d", "threads": 1, "torch": "t", "date": "day"}
        row["arguments"] = {}
    table = render.TABLES["end-to-end"](list(rows.values()))
    assert "| ours, equal settings | 0.8000 |" in table and "| 14.0x | 11.3x | 11.3x |" in table
    table = render.TABLES["ladder"]([row for row in rows.values() if row["part"] == "ladder"])
    assert f"| {TARGET} | {BF16} | 0 | 0.8000 |" in table and "| never |" in table

    with pytest.raises(RuntimeError, match="another study"):
        end_to_end.rows_of(replace(STUDY, num_views=256), tmp_path / "whole", [TARGET])
    capsys.readouterr()


@pytest.mark.slow
def test_the_whole_comparison_runs_in_miniature(tmp_path: Path) -> None:
    rows: dict[str, Any] = {}
    for part in PARTS:
        names = [arm for arm in PARTS[part].arms if arm != COMPILED]  # It would take minutes.
        command = [sys.executable, "-m", "benchmarks", "end-to-end", "--part", part, "--arms"]
        command += [*names, *SIZES, "--work", str(tmp_path), *SMALL]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows |= {row["arm"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert set(rows) == set(ARMS) - {COMPILED}
    assert all(rows[name]["images"] == 64 for name in rows.keys() - {FEW_STEPS, DEFAULT})
    for name in (EQUAL, FEW_STEPS, DEFAULT):
        assert rows[name]["proof"]["ops"][ladder.FUSED_LOSS] == 1
        assert rows[name]["proof"]["sampler"] == "DiffusionSampler"
    assert rows[TARGET]["proof"]["sampler_dtype"] == "float32"
    assert rows["compiled student"]["proof"]["compiled_graphs"] > 0
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stderr.count("there already") == len(IMAGES) - 1 + len(PARTS["ladder"].arms)


@pytest.mark.slow
def test_the_compiled_baseline_compiles_its_denoiser_within_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(arms.torch, "compile", lambda m, **_: (compiled.append(m), m)[1])
    monkeypatch.setattr(baseline, "BATCHES", (64,))
    study = replace(STUDY, overrides=(*SMALL, "sampler.num_steps=1", "num_threads=1"))
    made = arms.make_images(study, "diffusers bf16 compiled", tmp_path)
    assert len(compiled) == 1 and made["proof"]["sampler_dtype"] == "bfloat16"
    assert len(list((tmp_path / "images-diffusers-bf16-compiled" / "pngs").rglob("*.png"))) == 64
    assert ARMS[COMPILED].recipe == replace(ARMS[CHANNELS_LAST].recipe, compiled_student=True)  # type: ignore[type-var]


def test_a_seed_on_record_is_not_run_again_and_each_is_recorded_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up(tmp_path, STUDY)
    run.started.extend(["stopped"] * 7)  # type: ignore[attr-defined]
    monkeypatch.setattr(end_to_end.subprocess, "run", run)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    stamp = {"date": "today", "device": "CPU one"}
    for module in (harness, end_to_end):
        monkeypatch.setattr(module, "environment", lambda *_: dict(stamp))
    words = ["--part", "whole", *SIZES, "--work", str(tmp_path), "--record", *SMALL]
    monkeypatch.setattr(end_to_end.Report, "finish", lambda self, record: None)
    lines = []
    for has_bf16 in (True, False):
        monkeypatch.setattr(end_to_end, "cpu_has_bf16", lambda has=has_bf16: has)
        end_to_end.main(words)
        lines.append((tmp_path / "results" / "end-to-end.jsonl").read_text().splitlines())
    assert lines[0] == lines[1] and len(lines[0]) == len(PARTS["whole"].arms)
    said = capsys.readouterr().err
    assert said.count("seed 0: recorded already") == 1
    assert said.count("no bfloat16 instructions") == 1
    stamp["device"] = "CPU two"
    run.started.clear()  # type: ignore[attr-defined]
    run.started.extend(["stopped"] * 7)  # type: ignore[attr-defined]
    end_to_end.main(words)
    both = (tmp_path / "results" / "end-to-end.jsonl").read_text().splitlines()
    assert len(both) == 2 * len(lines[0])  # Times of another CPU are not those of this one.
    first, *_ = rows = [json.loads(line) for line in lines[0]]
    later = [row | {"seed": 1, "environment": {"date": "later"}} for row in rows]
    assert render._of_one_run([*rows, *later]) == [*rows, *later]
    other = first | {"configs": "changed"}
    assert render._of_one_run([*rows, other]) == [other]
