"""Finding 3 within a family: seeds apart, the grid that the page describes, slopes, resumption."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from likeness import likeness

from benchmarks.findings import finding_3_family as family
from benchmarks.findings import study
from dmkd_fast.classifiers.loading import build_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec

OPTIONS = family.parse(["--data", "DIR"])


@torch.no_grad()
def test_no_student_of_the_family_starts_like_a_teacher() -> None:
    """A teacher starts from its seed as `dmkd pretrain teacher` sets it."""
    seeds = [family.FIRST_TEACHER_SEED + i for i in range(OPTIONS.teacher_seeds)]
    assert not set(seeds) & set(study.student_seeds(50))
    # Networks of other shapes share no weights even with equal seeds.
    for name, teacher_name in (("resnet_half", "base"), ("resnet_quarter", "narrow")):
        model = family.TEACHERS[teacher_name].model
        spec = ClassifierSpec(
            architecture=model["arch"],
            stem=model["stem"],
            model_args=model["model_args"],
            num_classes=10,
            in_chans=1,
            input_size=28,
            mean=(0.286,),
            std=(0.353,),
        )
        for seed in seeds:
            torch.manual_seed(seed)
            teacher = build_classifier(spec)
            assert likeness(study.new_student(name, 1, spec)[0], teacher) < 5.5
        # What this would find.
        assert likeness(study.new_student(name, seeds[-1], spec)[0], teacher) > 10


def test_the_grid_is_the_one_that_is_described() -> None:
    cells = list(family.grid(OPTIONS))
    assert len({tuple(cell.values()) for cell in cells}) == len(cells)
    kl = [cell for cell in cells if cell["loss"] == "kl"]
    others = [cell for cell in cells if cell["loss"] != "kl"]
    assert len(kl) == 5 * 2 * 3 * 3 * 2 and len(others) == 2 * 3 * 1 * 3 * 2
    assert {cell["temperature"] for cell in others} == {4.0}
    assert {cell["teacher_seed"] for cell in cells} == {100, 101}
    # Width, depth and length are all that teachers differ in.
    assert {kind.model["stem"] for kind in family.TEACHERS.values()} == {"conv3_stride2"}
    base = family.TEACHERS["base"]
    for name, student in (("base", "resnet_half"), ("narrow", "resnet_quarter")):
        assert family.TEACHERS[name].model["model_args"] == study.STUDENTS[student]["model_args"]
    assert study.RECIPES["resnet_half"] == study.RECIPES["resnet_quarter"]
    changed = {
        name: {k for k, v in vars(kind).items() if v != vars(base)[k]}
        for name, kind in family.TEACHERS.items()
    }
    assert changed == {
        "short": {"length"},
        "narrow": {"channels"},
        "base": set(),
        "deep": {"blocks"},
        "wide": {"channels"},
    }


def rows() -> list[dict[str, Any]]:
    """Students lose 0.2 points per point of teacher accuracy, and 0.1 more with seed 2."""
    stamp = {"device": "CPU", "date": "2026-01-01"}
    accuracy = {"short": 0.80, "base": 0.85, "wide": 0.90}
    shared = {"environment": stamp, "views": 100, "cpu_s": 1.0}
    teachers = [
        {
            "part": "teacher",
            "teacher": name,
            "teacher_seed": seed,
            "top1": top1,
            "parameters": 10,
            "generated_top1": 0.7,
            "generated_entropy": 0.5,
            **shared,
        }
        for name, top1 in accuracy.items()
        for seed in (100, 101)
    ]
    students = [
        {
            "part": "student",
            "student": "resnet",
            "loss": "kl",
            "temperature": 4.0,
            "teacher": name,
            "teacher_seed": teacher_seed,
            "seed": seed,
            "top1": 0.9 - (0.2 + 0.1 * (seed == 2)) * top1,
            **shared,
        }
        for name, top1 in accuracy.items()
        for teacher_seed in (100, 101)
        for seed in (1, 2)
    ]
    return [*teachers, *students]


def test_slopes_are_of_each_pair_of_seeds_and_the_interval_is_over_students() -> None:
    every = rows()
    teachers = {(r["teacher"], r["teacher_seed"]): r for r in every if r["part"] == "teacher"}
    found = family.slopes([r for r in every if r["part"] == "student"], teachers)
    assert found == {1: pytest.approx([-0.2, -0.2]), 2: pytest.approx([-0.3, -0.3])}
    text = family.students_table(every)
    # Two students: -0.25 with t = 12.7 over a deviation of 0.0707 / sqrt(2).
    assert f"-0.25 ± {12.706 * 0.05:.2f} (2 seeds) |" in text
    assert f"| +1.25 ± {12.706 * 0.25:.2f} (2 seeds) |  | -0.25" in text
    assert "| resnet | kl | 4 | 70.00 | 68.75 | 67.50 |" in text
    assert family.interval([0.5]) == "+0.50 (1 seed)" and family.interval([]) == ""
    told = family.teachers_table([r for r in every if r["part"] == "teacher"])
    assert "| short | 16 32 64 64 x 1 | 10 | 100 | 80.00, 80.00 | 70.00, 70.00 |" in told


def test_seeds_that_a_stopped_study_left_incomplete_are_not_shown() -> None:
    every = rows()
    teachers, students = every[:6], every[6:]
    # Without one student of seed 2: that seed alone has no part in any figure.
    assert students[-1]["seed"] == 2
    assert family.whole_seeds(students[:-1]) == [r for r in students if r["seed"] == 1]
    text = family.students_table([*teachers, *students[:-1]])
    assert "| 74.00 | 73.00 | 72.00 | +1.00 (1 seed) |  | -0.20 (1 seed) |" in text
    for count in range(1, len(every)):
        family.students_table(every[:count])
        family.teachers_table(every[: min(count, 6)])
    marked = [*every, {**students[0], "top1": 0.1, "superseded": "starts as the teacher"}]
    assert family.students_table(marked) == family.students_table(every)


def test_every_student_has_the_settings_of_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(study, "generated", lambda *_, **__: None)
    monkeypatch.setattr(family, "train_teacher", lambda *_: {"top1": 0.5})
    monkeypatch.setattr(family, "on_images", lambda *_: {})
    monkeypatch.setattr(study, "train_student", lambda _, **given: seen.append(given) or {})
    family.main(["--data", "DIR", "--seeds", "2"])
    cells = list(family.grid(family.parse(["--data", "DIR", "--seeds", "2"])))
    assert len(seen) == len(cells)
    for given, cell in zip(seen, cells, strict=True):
        assert f"/{cell['teacher']}-{cell['teacher_seed']}-200000/" in given["teacher"]
        assert (given["student"], given["seed"]) == (cell["student"], cell["seed"])
        assert given["num_views"] == 48_000
        objective = given["objective"]
        assert objective.temperature == cell["temperature"]
        assert objective.standardize_logits == (cell["loss"] == "standardized")
        assert (objective.divergence == "dist") == (cell["loss"] == "dist")


def test_teachers_have_the_recipe_of_students_and_a_length_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"test_top1": 0.5, "held_out_top1": 0.5, "views": 1, "parameters": 1, "cpu_s": 1.0}
    configs: list[Any] = []
    monkeypatch.setattr(
        family, "pretrain_teacher", lambda config, *_, **__: configs.append(config) or found
    )
    for name in ("short", "base"):
        family.train_teacher(name, 100, OPTIONS)
    recipe = study.RECIPES["resnet_half"]
    for config, num_views in zip(configs, (20_000, 200_000), strict=True):
        assert config.train.num_views == num_views and config.seed == 100
        assert config.train.batch_size == recipe["batch_size"]
        assert (config.optim.name, config.optim.lr) == (recipe["name"], recipe["lr"])
        # Those of `study.fitted`.
        assert (config.optim.weight_decay, config.optim.ema_decay) == (0.05, 0.99)
        assert (config.views.pad, config.views.flip) == (recipe["pad"], 0.0)
        assert config.label_smoothing == 0


def test_accuracy_and_entropy_of_a_teacher_on_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halves(torch.nn.Module):
        """Always half class 0 and half class 1, the latter by a hair."""

        def forward(self, views: torch.Tensor) -> torch.Tensor:
            logits = torch.full((len(views), 10), -1e9)
            logits[:, 0], logits[:, 1] = 0.0, 1e-6
            return logits

    spec = ClassifierSpec(
        architecture="lenet5", num_classes=10, in_chans=1, input_size=28, mean=(0.3,), std=(0.3,)
    )
    monkeypatch.setattr(study, "load_teacher", lambda _: (Halves(), spec))
    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    found = family.on_images("", study.FixedSet(images=images, labels=torch.tensor([1, 0, 1, 1])))
    assert found == {"generated_top1": 0.75, "generated_entropy": 0.6931}


def test_another_teacher_than_the_recorded_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = study.Cells("finding-3-family", OPTIONS)
    of_teacher = {"teacher": "base", "teacher_seed": 100}
    cells.rows = [{"part": "teacher", **of_teacher, "top1": 0.91}]
    images = study.FixedSet(images=torch.zeros(0), labels=torch.zeros(0))
    monkeypatch.setattr(family, "train_teacher", lambda *_: {"top1": 0.91})
    family.get_teacher(cells, of_teacher, images, OPTIONS)
    monkeypatch.setattr(family, "train_teacher", lambda *_: {"top1": 0.92})
    with pytest.raises(SystemExit, match=r"got a top-1 of 0.92"):
        family.get_teacher(cells, of_teacher, images, OPTIONS)


@pytest.mark.slow
def test_teachers_and_cells_on_record_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip
    import struct

    test = study.test_images()
    for name in ("train", "t10k"):
        images, labels = test.images[:6_000], test.labels[:6_000]
        head = struct.pack(">IIII", 2051, len(images), 28, 28)
        with gzip.open(tmp_path / f"{name}-images-idx3-ubyte.gz", "wb", 1) as file:
            file.write(head + images.numpy().tobytes())
        with gzip.open(tmp_path / f"{name}-labels-idx1-ubyte.gz", "wb", 1) as file:
            file.write(struct.pack(">II", 2049, len(labels)) + labels.byte().numpy().tobytes())
    few = study.FixedSet(images=test.images[:1_024], labels=test.labels[:1_024])
    monkeypatch.setattr(study, "generated", lambda *_, **__: few)
    monkeypatch.setattr(study, "CACHE", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path)
    monkeypatch.setattr(family, "TEACHERS", {k: family.TEACHERS[k] for k in ("short", "narrow")})
    monkeypatch.setattr(family, "FEWER", ("short",))
    monkeypatch.setattr(family, "TEMPERATURES", (4.0,))
    call = ["--data", str(tmp_path), "--record", "--views", "640", "--teacher-views", "1280"]
    call += ["--seeds", "1", "--teacher-seeds", "1", "--students", "resnet_quarter"]
    torch.set_num_threads(1)
    family.main(call)
    before = (tmp_path / "finding-3-family.jsonl").read_text()
    assert len(before.splitlines()) == 2 + 2 + 2
    monkeypatch.setattr(study, "train_student", None)
    family.main(call)
    assert (tmp_path / "finding-3-family.jsonl").read_text() == before
    kept = argparse.Namespace(**vars(family.parse(call)))
    assert Path(family.teacher_path("short", 100, kept.teacher_views)).is_dir()
