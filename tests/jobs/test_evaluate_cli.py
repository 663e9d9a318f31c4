"""`dmkd evaluate`: any classifier or run on any set, as a plain measurement would have it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_sets import COLOUR, NAMES, picture
from small_jobs import CONFIG, SHORT, few_test_images
from timm.data import create_transform

from dmkd_fast import InputSpec, cli, measure, open_set
from dmkd_fast.assets import resolve
from dmkd_fast.classifiers.loading import build_classifier, load_classifier, save_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.data import test_sets
from dmkd_fast.training import scoring

CPU = torch.device("cpu")


def saved_classifier(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    base: dict[str, Any] = {
        "architecture": "cifar_resnet8",
        "num_classes": 3,
        "in_chans": 3,
        "input_size": 24,
        "mean": COLOUR.mean,
        "std": COLOUR.std,
        "crop_pct": 0.75,
    }
    spec = ClassifierSpec(**(base | changes))
    torch.manual_seed(0)
    save_classifier(build_classifier(spec), spec, folder)
    return folder


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_the_command_line_measures_any_classifier_on_any_set(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    place = request.getfixturevalue(kind)
    saved = saved_classifier(tmp_path / "model")
    assert cli.main(["evaluate", str(saved), "--data", str(place)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    model, spec = load_classifier(saved, CPU)
    scores = measure(
        model, open_set(place, CPU).batches([spec.input]), input=spec.input, num_classes=3
    )
    assert {k: found[k] for k in ("top1", "top5", "ece")} == scores.result()
    assert found["num_images"] == 23 and len(found["class_top1"]) == 3
    names = NAMES if kind == "folder" else ("0", "1", "2")
    for name, row in zip(names, scores.by_class(), strict=True):
        assert found["class_top1"][name] == row["top1"]
        assert any(name in line and f"{row['top1']:.4f}" in line for line in table)


def test_the_directory_of_a_pretrained_teacher_stands_for_the_teacher(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    saved_classifier(run / "model")
    (run / "config.yaml").write_text("name: teacher\n")
    assert cli.main(["evaluate", str(run), "--data", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["num_images"] == 23 and found["run_dir"] == str(run)
    assert cli.main(["evaluate", str(run)]) == 2
    assert "--data: got none for" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_measured_on_its_own_set_or_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with two teachers of other sizes, tested on an ImageFolder, then on idx files."""
    big = saved_classifier(
        tmp_path / "big",
        architecture="lenet5",
        num_classes=12,
        in_chans=1,
        input_size=32,
        mean=(0.3,),
        std=(0.4,),
        crop_pct=1.0,
    )
    place = tmp_path / "photos"
    for label in range(10):
        (place / str(label)).mkdir(parents=True)
        picture(label, 30, 34).convert("L").save(place / str(label) / "0.png")
    more = f"more_teachers=[{{path: {big}, class_map: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}}]"
    run = tmp_path / "run"
    command = [
        "distill",
        CONFIG,
        *SHORT,
        f"run_dir={run}",
        more,
        f"eval={{path: {place}}}",
        "train.num_views=64",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dmkd_fast", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["teacher_license"] and str(big) in (run / "student" / "README.md").read_text()
    test_set = ["--data", str(resolve("embedded:fashion_mnist/test"))]
    for arguments, count in (([], 10), (test_set, 10_000)):
        assert cli.main(["evaluate", str(run), *arguments]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["num_images"] == count and 0 <= found["agreement"] <= 1
        if not arguments:
            assert {k: found[k] for k in ("top1", "agreement", "teacher_top1")} == {
                k: summary[k] for k in ("top1", "agreement", "teacher_top1")
            }


def test_a_job_of_some_classes_in_another_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ankle boots, trousers and bags of a 10-class generator and a 10-class teacher."""
    test = test_sets.load_idx(resolve("embedded:fashion_mnist/test"), "t10k")
    own = (9, 1, 8)
    for label, original in enumerate(own):
        place = tmp_path / "set" / f"{label}-{test.class_names[original]}".replace("/", "-")
        place.mkdir(parents=True)
        for i in (test.labels == original).nonzero()[:40, 0].tolist():
            Image.fromarray(test.images[i, 0].numpy()).save(place / f"{i}.png")
    arguments = [
        "distill",
        CONFIG,
        *SHORT,
        f"run_dir={tmp_path}/run",
        f"eval={{path: {tmp_path}/set}}",
        "denoiser.class_map=[9, 1, 8]",
        "teacher.class_map=[9, 1, 8]",
        "train.num_views=1600",
        "sampler={num_steps: 2, guidance_scale: 1, compile: false, micro_batch_images: 64, "
        "phases: [{start: 0.5, num_steps: 1, guidance_scale: 1}]}",
    ]
    assert cli.main(arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["teacher_top1"] > 0.95  # the teacher's map is in the order of the set
    assert summary["top1"] > 0.6  # and the generator's in the order of both
    # The student's file has the names, and the card how timm loads it.
    _, spec = load_classifier(tmp_path / "run" / "student", CPU)
    names = spec.label_names
    assert names and [name[0] for name in names] == ["0", "1", "2"]
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert 'timm.create_model("local-dir:.", pretrained=True)' in card
    # Another order of them is refused, for the student's names and for those of its teachers.
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    for label, name in enumerate(names):
        place = tmp_path / "other" / f"{(label + 1) % 3} {name}"
        place.mkdir(parents=True)
        picture(label, 30, 30).convert("L").save(place / "0.png")
    assert cli.main(["evaluate", run, "--data", other]) == 2
    line = capsys.readouterr().err
    assert "class 0 is" in line and "in student" in line and "--classes" in line
    teacher = saved_classifier(
        tmp_path / "teacher",
        architecture="lenet5",
        in_chans=1,
        input_size=28,
        mean=(0.3,),
        std=(0.4,),
        crop_pct=1.0,
        label_names=(names[1], names[0], names[2]),
    )
    arguments += [f"teacher.path={teacher}", "--dry-run", f"run_dir={tmp_path}/none"]
    assert cli.main([*arguments, "teacher.class_map=[1, 0, 2]"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "teacher.class_map=[0, 1, 2]"]) == 2
    line = capsys.readouterr().err
    assert "in teacher.path" in line and "eval.classes" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}"], ["--data", "not the directory of a run"]),
        (["{model}", "--data", "{tmp}/none"], ["none", "no such folder"]),
        (["{model}", "--data", "{two}"], ["classes", "has 2", "have 3"]),
        (["{model}", "--data", "{folder}", "--classes", "{tmp}/none.txt"], ["none.txt", "no such"]),
        (["{tmp}", "--classes", "{tmp}/x"], ["--classes", "add --data"]),
        (["{tmp}", "--data", "{folder}"], ["config.yaml of a run", "config.json of a classifier"]),
        (["embedded:fashion_mnist/weak", "--data", "{folder}"], ["classes", "has 3", "have 10"]),
        (["embedded:fashion_mnist/best", "--data", "{folder}"], ["no such asset"]),
        (["resnet1800", "--data", "{folder}"], ["resnet1800", "timm"]),
        (["hf-hub:acme/tiny", "--data", "{folder}"], ["revision", "40 hexadecimal"]),
        (["{tmp}/nowhere", "--data", "{folder}"], ["nowhere", "no such run or classifier"]),
    ],
)
def test_mistakes_of_evaluate_end_in_one_line(
    arguments: list[str],
    words: list[str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, two = saved_classifier(tmp_path / "model"), tmp_path / "two"
    for name in ("a", "b"):
        (two / name).mkdir(parents=True)
        picture(0, 30, 30).save(two / name / "0.png")
    places = {"{model}": model, "{two}": two, "{folder}": folder, "{tmp}": tmp_path}
    for mark, path in places.items():
        arguments = [a.replace(mark, str(path)) for a in arguments]
    assert cli.main(["evaluate", *arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("dmkd: "), captured.err
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squashed_images_are_prepared_as_timm_prepares_them(
    interpolation: Any, folder: Path
) -> None:
    spec = InputSpec(
        size=24,
        mean=COLOUR.mean,
        std=COLOUR.std,
        crop_pct=0.8,
        interpolation=interpolation,
        crop_mode="squash",
    )
    images = open_set(folder, CPU)
    assert isinstance(images, test_sets.EncodedSet)
    theirs = create_transform(
        (3, 24, 24),
        interpolation=interpolation,
        crop_pct=0.8,
        crop_mode="squash",
        mean=spec.mean,
        std=spec.std,
    )
    std = torch.tensor(spec.std)[:, None, None]
    got = torch.cat([views[spec] for views, _ in images.batches([spec])])
    for item, decoded in zip(images.items, got, strict=True):
        image = Image.open(io.BytesIO(item.read())).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        for mine in (decoded, test_sets.prepare(pixels, spec)[0]):
            levels = (mine - theirs(image)).abs() * std * 255
            assert levels.mean() < 0.6 and levels[:, 3:-3, 3:-3].max() <= (
                1.01 if interpolation == "bilinear" else 8
            )


def test_evaluation_says_what_size_it_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for test_size, said in ((None, ""), (24, ""), (32, "test_input_size 32, which is not used")):
        place = tmp_path / str(test_size)
        saved_classifier(place, test_input_size=test_size)
        assert cli.main(["evaluate", str(place), "--data", str(folder)]) == 0
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first.startswith("input 24 x 24, crop_pct 0.75, bilinear")
        assert ("not used" in first) == bool(said) and said in first
        found = json.loads(last)
        assert (found["input_size"], found["crop_pct"], found["crop_mode"]) == (24, 0.75, "center")


def test_classes_in_another_order_are_mapped_by_name_and_other_names_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names in the classifier's file; `--classes` states the order and ends the comparison."""
    mapped = saved_classifier(tmp_path / "mapped", label_names=("bee", "ant", "cat"))
    assert cli.main(["evaluate", str(mapped), "--data", str(folder)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last["class_top1"]) == ["bee", "ant", "cat"]
    right = saved_classifier(tmp_path / "right", label_names=("Ant", "bee", "cat"))
    wrong = saved_classifier(tmp_path / "wrong", label_names=("bee", "ant", "dog"))
    order = tmp_path / "order.txt"
    order.write_text("bee\nant\ncat\n")
    assert cli.main(["evaluate", str(right), "--data", str(folder)]) == 0
    assert cli.main(["evaluate", str(wrong), "--data", str(folder)]) == 2
    line = capsys.readouterr().err
    assert "class 0 is 'bee'" in line and "--classes" in line and line.count("\n") == 1
    assert cli.main(["evaluate", str(wrong), "--data", str(folder), "--classes", str(order)]) == 0


def test_numbers_of_shards_without_a_list_are_labels_and_are_not_mapped(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for names in (("0", "2", "1"), ("0", "1", "2")):
        model = saved_classifier(tmp_path / "".join(names), label_names=names)
        assert cli.main(["evaluate", str(model), "--data", str(shards)]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        found.append(result["top1"])
    assert found[0] == found[1]


def test_idx_files_take_the_names_of_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, names = few_test_images(20), tuple(f"kind {label}" for label in range(10))
    gray: dict[str, Any] = {"num_classes": 10, "in_chans": 1, "mean": (0.3,), "std": (0.3,)}
    model = saved_classifier(tmp_path / "model", label_names=names, **gray)
    order = tmp_path / "order.txt"
    order.write_text("\n".join(names[:3]))
    command = ["evaluate", str(model), "--data", str(data), "--classes", str(order)]
    assert cli.main(command) == 2
    assert "got 3 names, expected at least 10" in capsys.readouterr().err
    order.write_text("\n".join(names))
    assert cli.main(command) == 0


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_logits_that_are_not_finite_count_as_wrong(share: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 6), torch.randint(0, 6, (40,))
    judged = torch.randn(40, 6)
    bad = torch.arange(40) < 40 * share
    broken = logits.clone()
    broken[bad] = torch.tensor([0, float("nan"), 1, 2, 3, 4])
    broken[0] = float("inf")
    broken[1] = -float("inf")
    scores, fewer = scoring.Scores(6), scoring.Scores(6)
    scores.add(broken, labels, judged)
    assert scores.num_not_finite == bad.sum() and scores.num_images == 40
    got = scores.result()
    right = (logits.argmax(1) == labels) & ~bad
    assert got["top1"] == pytest.approx(right.float().mean().item())
    assert got["agreement"] == pytest.approx(
        ((logits.argmax(1) == judged.argmax(1)) & ~bad).float().mean().item()
    )
    if share < 1:  # the calibration error is that of the others, as a share of all
        fewer.add(logits[~bad], labels[~bad])
        assert got["ece"] == pytest.approx(fewer.result()["ece"] * (1 - share))
    masked = logits.clone()
    masked[:, 5] = -float("inf")  # a class that cannot be: a softmax all the same
    only = scoring.Scores(6)
    only.add(masked, labels, broken)
    assert only.num_not_finite == 0
    teacher = only.result()
    assert teacher["teacher_top1"] == pytest.approx(right.float().mean().item())


def test_a_classifier_of_nans_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = saved_classifier(tmp_path / "model")
    model, spec = load_classifier(place, CPU)
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    save_classifier(model, spec, place)
    assert cli.main(["evaluate", str(place), "--data", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "NaN or infinite logits for all of 23 images" in captured.err
    assert captured.out == "" and captured.err.count("\n") == 1
