"""Daily use: classes by name, a run by its directory, a resume that says where it goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_jobs import CONFIG, SHORT

from dmkd_fast import ImageSet, cli, evaluate, load_classifier
from dmkd_fast.assets import resolve
from dmkd_fast.classifiers.loading import save_classifier
from dmkd_fast.data.class_names import order_by_name
from dmkd_fast.data.test_sets import in_order_of, load_idx
from dmkd_fast.jobs import distill
from dmkd_fast.runtime import errors
from dmkd_fast.runtime.errors import UserError

WEAK = "embedded:fashion_mnist/weak"
NAMES = ("zebra", "Apple tree", "moon", "house", "x1", "x2", "x3", "x4", "x5", "x6")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("daily") / "run"
    distill.run(CONFIG, [*SHORT, f"run_dir={folder}"], show=False)
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier with class names, and images in class folders of these names."""
    root = tmp_path_factory.mktemp("named")
    model, spec = load_classifier(WEAK)
    (root / "model").mkdir()
    values: dict[str, Any] = vars(spec) | {"label_names": NAMES}
    save_classifier(model, type(spec)(**values), root / "model")
    real = load_idx(resolve("embedded:fashion_mnist/test"), "t10k")
    for label, name in enumerate(NAMES):
        folder = root / "images" / name.lower().replace(" ", "_")
        folder.mkdir(parents=True)
        for number in (real.labels == label).nonzero()[:3, 0].tolist():
            Image.fromarray(np.array(real.images[number, 0])).save(folder / f"{number}.png")
    return root / "model", root / "images"


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_class_folders_are_mapped_by_name(named: tuple[Path, Path]) -> None:
    model, images = named
    found = evaluate(model, images, show=False)
    assert list(found.classes) == list(NAMES) and found.scores["top1"] > 0.6
    assert found.summary()["run_dir"] is None


def test_other_class_names_are_an_error_that_names_the_setting(
    named: tuple[Path, Path], tmp_path: Path
) -> None:
    model, images = named
    (tmp_path / "images").symlink_to(images)
    other = tmp_path / "other"
    other.mkdir()
    for folder in images.iterdir():
        name = "sun" if folder.name == "moon" else folder.name
        (other / name).symlink_to(folder)
    with pytest.raises(UserError, match="set --classes to a file"):
        evaluate(model, other, show=False)
    changes = [*SHORT, f"teacher.path={model}", f"eval.path={other}"]
    with pytest.raises(UserError, match=r"set eval\.classes to a file"):
        list(distill.dry_run(CONFIG, changes))


def test_folders_whose_order_nothing_states_are_named_before_a_run(
    named: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_warned", set())
    _, images = named
    with caplog.at_level(logging.WARNING, logger="dmkd_fast"):
        list(distill.dry_run(CONFIG, [*SHORT, f"eval.path={images}"]))
    (warning,) = [text for text in caplog.messages if "no class names" in text]
    assert "in the order apple_tree, house, moon, ..." in warning and "eval.classes" in warning


def test_names_are_mapped_only_where_the_sets_agree() -> None:
    assert order_by_name(["b c", "A"], ["a", "B_C"]) == [1, 0]
    for wanted in (None, ["a", "x"], ["a"], ["a", "a"], ["0", "1"]):
        assert order_by_name(["b", "a"], wanted) is None
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    real = ImageSet(images=images, labels=torch.tensor([0, 1, 1]), class_names=("b", "a"))
    mapped = in_order_of(real, ("a", "b"))
    assert isinstance(mapped, ImageSet) and mapped.labels.tolist() == [1, 0, 0]
    assert mapped.class_names == ("a", "b") and in_order_of(real, ("a", "c")) is real


def test_a_classifier_loads_from_a_string_a_run_and_without_a_device(run: Path) -> None:
    images = torch.zeros(2, 1, 28, 28)
    expected = load_classifier(run / "student", torch.device("cpu"))[0](images)
    for path in (run, str(run), f"{run}/student"):
        assert torch.equal(load_classifier(path)[0](images), expected)
    assert load_classifier(WEAK)[1].num_classes == 10
    with pytest.raises(UserError, match=r"config\.json"):
        load_classifier(run / "checkpoints")


def test_the_published_weights_are_the_average(run: Path) -> None:
    state = load_file(max((run / "checkpoints").glob("step-*")) / "state.safetensors")
    published = load_file(run / "student" / "model.safetensors")
    pairs = {kind: [] for kind in ("average/module", "student")}
    for name, value in published.items():
        for kind, same in pairs.items():
            same.append(torch.equal(value, state[f"{kind}/{name}"]))
    assert all(pairs["average/module"]) and not any(pairs["student"])


def test_a_run_that_does_not_exist_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run.parent / "nope")]) == 2
    line = capsys.readouterr().err
    assert "no such run or classifier; did you mean" in line and str(run) in line


def test_resuming_a_finished_run_changes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run)
    assert cli.main(["distill", str(run / "config.yaml"), f"run_dir={run}", "--resume"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((run / "summary.json").read_text())
    assert "the run has ended; nothing was changed" in captured.err
    assert files_of(run) == before


def test_every_summary_names_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["run_dir"] == str(run)
    for more in ([], ["--json"]):
        assert cli.main(["report", str(run), *more, "--out", str(tmp_path / "page.html")]) == 0
        assert json.loads(capsys.readouterr().out)["run_dir"] == str(run)
    assert evaluate(run, show=False).summary()["run_dir"] == str(run)
    assert json.loads((run / "summary.json").read_text())["run_dir"] == str(run)
    assert evaluate(run / "student", WEAK.replace("weak", "test"), show=False).run_dir == str(run)


def test_the_demo_runs_its_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [text for text in SHORT if not text.startswith(("sampler.num", "student"))]
    changes = [*short, "student={arch: lenet5_half}", "sampler.num_steps=4"]
    assert cli.main(["demo", "--quiet", *changes]) == 0
    captured = capsys.readouterr()
    *_, line, report, after, last = captured.out.splitlines()
    summary = json.loads(last)
    assert Path(summary["run_dir"]).is_relative_to("runs") and f"{summary['top1']:.1%}" in line
    assert report == f"report: {summary['run_dir']}/report.html"
    assert "dmkd init" in after and "ETA" not in captured.err
