"""`dmkd evaluate`: any classifier or run on any set, as a plain measurement would have it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG, SHORT
from PIL import Image
from real_sets import COLOUR, NAMES, picture

from dmkd_fast import cli, image_sets, measure, models, open_set
from dmkd_fast.models import ClassifierSpec

CPU = torch.device("cpu")


def saved_classifier(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    base: dict[str, Any] = {
        "architecture": "cifar_resnet8", "num_classes": 3, "in_chans": 3, "input_size": 24,
        "mean": COLOUR.mean, "std": COLOUR.std, "crop_pct": 0.75,
    }  # fmt: skip
    spec = ClassifierSpec(**(base | changes))
    torch.manual_seed(0)
    models.save_classifier(models.build_classifier(spec), spec, folder)
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
    model, spec = models.load_classifier(saved, CPU)
    scores = measure(
        model, open_set(place, CPU).batches([spec.input]), input=spec.input, num_classes=3
    )
    assert {k: found[k] for k in ("top1", "top5", "ece")} == scores.result()
    assert found["num_images"] == 23 and len(found["class_top1"]) == 3
    names = NAMES if kind == "folder" else ("0", "1", "2")
    for name, row in zip(names, scores.by_class(), strict=True):
        assert found["class_top1"][name] == row["top1"]
        assert any(name in line and f"{row['top1']:.4f}" in line for line in table)


@pytest.mark.slow
def test_a_run_is_measured_on_its_own_set_or_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with two teachers of other sizes, tested on an ImageFolder, then on idx files."""
    big = saved_classifier(
        tmp_path / "big", architecture="lenet5", num_classes=12, in_chans=1, input_size=32,
        mean=(0.3,), std=(0.4,), crop_pct=1.0,
    )  # fmt: skip
    place = tmp_path / "photos"
    for label in range(10):
        (place / str(label)).mkdir(parents=True)
        picture(label, 30, 34).convert("L").save(place / str(label) / "0.png")
    more = f"more_teachers=[{{path: {big}, class_map: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}}]"
    run = tmp_path / "run"
    command = ["distill", CONFIG, *SHORT, f"run_dir={run}", more, f"eval={{path: {place}}}",
               "train.num_views=64"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "dmkd_fast.cli", *command], capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["teacher_licence"] and str(big) in (run / "student" / "README.md").read_text()
    for arguments, count in (([], 10), (["--data", "embedded"], 10_000)):
        if arguments:
            from dmkd_fast.assets import resolve

            arguments = ["--data", str(resolve("embedded:fashion_mnist/test"))]
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
    from dmkd_fast.assets import resolve

    test = image_sets.load_idx(resolve("embedded:fashion_mnist/test"), "t10k")
    own = (9, 1, 8)
    for label, original in enumerate(own):
        place = tmp_path / "set" / f"{label}-{test.class_names[original]}".replace("/", "-")
        place.mkdir(parents=True)
        for i in (test.labels == original).nonzero()[:40, 0].tolist():
            Image.fromarray(test.images[i, 0].numpy()).save(place / f"{i}.png")
    arguments = [
        "distill", CONFIG, *SHORT, f"run_dir={tmp_path}/run", f"eval={{path: {tmp_path}/set}}",
        "denoiser.class_map=[9, 1, 8]", "teacher.class_map=[9, 1, 8]", "train.num_views=1600",
        "sampler={num_steps: 2, guidance_scale: 1, compile: false, micro_batch_images: 64, "
        "phases: [{start: 0.5, num_steps: 1, guidance_scale: 1}]}",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["teacher_top1"] > 0.95  # the teacher's map is in the order of the set
    assert summary["top1"] > 0.6  # and the generator's in the order of both


@pytest.mark.parametrize(("arguments", "words"), [
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
    (["{tmp}/nowhere", "--data", "{folder}"], ["config.json", "No such file"]),
])  # fmt: skip
def test_mistakes_of_evaluate_end_in_one_line(
    arguments: list[str], words: list[str], folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
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
