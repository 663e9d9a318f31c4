"""Pretraining on folders of image files and on shards: sizes, classes, and the held-out split."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from real_sets import NAMES, encoded, write_shard
from small_jobs import few_test_images

from dmkd_fast import InputSpec, cli, load_classifier, open_set
from dmkd_fast.config.data import RealImagesConfig
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.data.test_sets import EncodedSet
from dmkd_fast.jobs.images import denoiser_class_names
from dmkd_fast.jobs.parts import load_parts
from dmkd_fast.jobs.pretrain import cache, real_data
from dmkd_fast.jobs.pretrain.real_data import load_real
from dmkd_fast.jobs.report import images as report_images
from dmkd_fast.jobs.resolve import resolve
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.training import scoring

CPU = torch.device("cpu")
SMALL = RealImagesConfig(image_size=16, held_out=0.25)
COMMON: dict[str, Any] = {
    "num_threads": 1,
    "dtype": "float32",
    "data": {"image_size": 16, "held_out": 0.25},
    "optim": {"name": "adamw", "lr": 1e-3},
    "train": {"batch_size": 8, "num_views": 16, "compile": False, "log_every_steps": 1},
}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    return root / "dmkd_fast"


def names_in(record: str) -> list[str]:
    return record.splitlines()[1:]


def pretrained(kind: str, config: dict[str, Any], data: Path, out: Path, capsys: Any) -> dict:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"name": kind, **COMMON, **config}))
    assert cli.main(["pretrain", kind, str(path), f"run_dir={out}", "--data", str(data)]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return facts


def few_step(denoiser: Path, out: Path) -> None:
    """Train a denoiser of one step from a saved one."""
    config = {
        "denoiser": {"path": str(denoiser)},
        "sampler": {"num_steps": 2, "micro_batch_images": 8, "compile": False},
        "num_steps": 1,
        "pool_images": 8,
    }
    shared = {name: value for name, value in COMMON.items() if name != "data"}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"name": "few", **shared, **config}))
    assert cli.main(["pretrain", "fewstep", str(path), f"run_dir={out}"]) == 0


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class folders as `train`, and some images of theirs as `test`."""
    root = tmp_path_factory.mktemp("parts")
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "test", ignore=shutil.ignore_patterns("deeper"))
    return root


def test_images_are_those_of_the_evaluation_and_the_split_is_by_name(
    folder: Path, tmp_path: Path
) -> None:
    real = load_real(folder, CPU, SMALL)
    assert real.train.images.shape == (17, 3, 16, 16) and len(real.held_out) == 6
    assert real.train.class_names == NAMES and real.test is None
    assert sorted(real.held_out.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    held_out = names_in(real.record)
    opened = open_set(folder, CPU)
    spec = InputSpec(size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    ((views, _),) = opened.batches([spec])
    names = [str(Path(item.path).relative_to(folder)) for item in opened.items]
    wanted = torch.stack([views[spec][names.index(name)] for name in held_out])
    assert torch.equal(real.held_out.images, (wanted * 255).round().to(torch.uint8))
    shutil.copytree(folder, tmp_path / "moved")
    assert load_real(tmp_path / "moved", CPU, SMALL).record == real.record
    gray = load_real(folder, CPU, SMALL.model_copy(update={"channels": 1}))
    assert gray.train.images.shape[1] == 1


def test_shards_give_the_same_images(folder: Path, shards: Path) -> None:
    real = load_real(shards, CPU, SMALL)
    assert real.train.class_names == ("0", "1", "2")
    assert all(".tar: part/" in name for name in names_in(real.record))
    both = [load_real(place, CPU, SMALL) for place in (folder, shards)]
    totals = [sum(int(part.images.sum()) for part in (r.train, r.held_out)) for r in both]
    assert totals[0] == totals[1]


def test_names_and_split_travel_from_the_folder_to_the_job(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Teacher, denoiser and few-step denoiser of a color folder fit into a job with it."""
    model = {"model": {"arch": "cifar_resnet8"}, "views": {"size": 16}}
    facts = pretrained("teacher", model, parts, tmp_path / "teacher", capsys)
    saved = tmp_path / "teacher" / "model"
    assert load_classifier(saved, CPU)[1].label_names == NAMES
    assert len(names_in((tmp_path / "teacher" / "held_out.txt").read_text())) == 6
    assert cli.main(["evaluate", str(saved), "--data", str(parts / "test")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["top1"] == facts["test_top1"] and set(found["class_top1"]) == set(NAMES)

    dit = {"patch_size": 4, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    pretrained("denoiser", dit, parts, tmp_path / "denoiser", capsys)
    few_step(tmp_path / "denoiser" / "model", tmp_path / "few")
    for name in ("denoiser", "few"):
        assert (tmp_path / name / "model" / "classes.txt").read_text().split() == list(NAMES)

    path = tmp_path / "job.yaml"
    job = {
        "name": "job",
        "denoiser": {"path": str(tmp_path / "few" / "model")},
        "sampler": {"num_steps": 1, "micro_batch_images": 8, "compile": False},
        "ring": {"capacity_images": 64, "min_fill_images": 16, "samples_per_insert": 4},
        "views": {"size": 16},
        "teacher": {"path": str(saved)},
        "student": {"arch": "cifar_resnet8"},
        "optim": COMMON["optim"],
        "train": COMMON["train"],
        "eval": {"path": str(parts / "test")},
    }
    path.write_text(yaml.safe_dump(job))
    for num_points in (1, 3):  # Decoded pixels are kept only for further evaluations.
        config = load_config(DistillConfig, path, [f"eval.num_points={num_points}"])
        loaded = load_parts(resolve(config))
        assert loaded.student_spec.in_chans == 3
        assert isinstance(loaded.test_set, EncodedSet)
        assert loaded.test_set.is_repeated == (num_points > 1)
    (tmp_path / "few" / "model" / "classes.txt").write_text("bee\nant\ncat\n")
    with pytest.raises(UserError, match=r"class 0 is 'bee' in denoiser.path and 'ant'"):
        load_parts(resolve(load_config(DistillConfig, path)))
    config_of = load_config(DistillConfig, path, ["denoiser.class_map=[2, 0]"]).denoiser
    assert denoiser_class_names(config_of) == ("cat", "bee")


def test_an_evaluation_sees_the_order_of_numbers_that_a_list_gave_the_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list is beside `train` and `test`, so an evaluation of `test` does not read it."""
    numbers = dict(zip(NAMES, ("10", "1", "2"), strict=True))
    for name, number in numbers.items():
        for part in ("train", "test"):
            shutil.copytree(folder / name, tmp_path / "data" / part / number)
    (tmp_path / "data" / "classes.txt").write_text("1\n10\n2\n")
    model = {"model": {"arch": "cifar_resnet8"}, "views": {"size": 16}}
    out = tmp_path / "teacher"
    facts = pretrained("teacher", model, tmp_path / "data", out, capsys)
    test = tmp_path / "data" / "test"
    assert cli.main(["evaluate", str(out / "model"), "--data", str(test)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["class_top1"]) == ["1", "10", "2"]
    assert found["top1"] == facts["test_top1"]


def test_images_are_decoded_once_until_a_file_changes(
    folder: Path, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(folder, tmp_path / "images")
    first = load_real(place, CPU, SMALL)
    before = {path: path.read_bytes() for path in cache_folder.glob("*.safetensors")}
    assert len(before) == 2  # to train on, and held out
    batches = EncodedSet.batches
    monkeypatch.setattr(EncodedSet, "batches", lambda *_: pytest.fail("decoded again"))
    second = load_real(place, CPU, SMALL)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.held_out.labels, second.held_out.labels)
    (damaged,) = [p for p in before if p.stat().st_size == max(map(len, before.values()))]
    damaged.write_bytes(before[damaged][:-1])
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load_real(place, CPU, SMALL)
    monkeypatch.setattr(EncodedSet, "batches", batches)
    load_real(place, CPU, SMALL)
    assert damaged.read_bytes() == before[damaged]
    load_real(place, CPU, RealImagesConfig(image_size=8, held_out=0.25))
    os.utime(place / "ant" / "003.png", (1, 1))
    load_real(place, CPU, SMALL)
    assert len(list(cache_folder.glob("*.safetensors"))) == 5


def test_a_cache_that_cannot_be_written_changes_nothing(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load_real(folder, CPU, SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "ant" / "notes.txt"))  # a file
    made = load_real(folder, CPU, SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder.parent / "other"))
    monkeypatch.setattr(cache, "MOST_OF_DISK", 0)
    assert torch.equal(load_real(folder, CPU, SMALL).train.images, kept.train.images)
    assert torch.equal(made.train.images, kept.train.images)
    assert not list((cache_folder.parent / "other").rglob("*.safetensors"))


def test_a_run_is_not_resumed_with_other_images(parts: Path, tmp_path: Path, capsys: Any) -> None:
    model = {"model": {"arch": "cifar_resnet8"}, "views": {"size": 16}}
    pretrained("teacher", model, parts, tmp_path / "run", capsys)
    (tmp_path / "run" / "summary.json").unlink()  # what an interrupted run does not have
    data, _ = encoded(1)
    changed = shutil.copytree(parts, tmp_path / "changed")
    (changed / "train" / "ant" / "new.png").write_bytes(data)
    command = ["pretrain", "teacher", str(tmp_path / "run.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert cli.main([*command, "--resume", "--data", str(changed)]) == 2
    assert "images were added, removed or renamed" in capsys.readouterr().err
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("held_out: 0.25", "held_out: 0.5"))
    assert cli.main([*command, "--resume", "--data", str(parts)]) == 2
    assert "data.held_out: got other images than those in" in capsys.readouterr().err


def test_a_run_on_idx_files_is_not_resumed_with_others_held_out(tmp_path: Path) -> None:
    data = few_test_images(20)
    for path in list(data.iterdir()):
        shutil.copy(path, data / path.name.replace("t10k", "train"))
    load_real(data, CPU, RealImagesConfig(held_out=0.25)).write_record(tmp_path)
    with pytest.raises(UserError, match=r"data\.held_out: got other images than those in"):
        load_real(data, CPU, RealImagesConfig(held_out=0.5)).write_record(tmp_path)


def test_mistakes_are_refused_in_one_line(
    folder: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"data\.image_size: got null for image files"):
        load_real(folder, CPU)
    data, kind = encoded(0)
    write_shard(tmp_path / "a.tar", [(f"a.{kind}", data), ("a.cls", b"0")])
    with pytest.raises(UserError, match="fewer than 2 images of class 0, expected at least 2"):
        load_real(tmp_path, CPU, SMALL)
    few = tmp_path / "few"
    for name in ("bat", "cod", "dog", "eel", "fox", "gnu"):
        (few / name).mkdir(parents=True)
        (few / name / f"a.{kind}").write_bytes(data)
    shutil.copytree(folder / "ant", few / "ant")
    with pytest.raises(UserError, match="images of class bat, cod, dog, eel, fox and 1 more, exp"):
        load_real(few, CPU, SMALL)
    other = shutil.copytree(parts, tmp_path / "other")
    (other / "test" / "cat").rename(other / "test" / "dog")
    with pytest.raises(UserError, match=r"class 2 is 'cat' in .*train and 'dog'"):
        load_real(other, CPU, SMALL)
    shutil.rmtree(other / "test" / "dog")
    with pytest.raises(UserError, match=r"no class cat in \S+/test, expected the 3 of \S+/train"):
        load_real(other, CPU, SMALL)
    shutil.copytree(other / "train" / "cat", other / "test" / "cat")
    shutil.copytree(other / "train" / "cat", other / "test" / "cow")
    with pytest.raises(UserError, match=r"class cow in \S+/test, expected the 3 of \S+/train"):
        load_real(other, CPU, SMALL)
    monkeypatch.setattr(real_data, "available_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"expected at most .* GiB; lower data\.image_size"):
        load_real(folder, CPU, SMALL)


def test_a_class_may_be_called_train(
    folder: Path, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat = tmp_path / "flat"
    for place, name in zip(sorted(folder.iterdir()), ("bus", "car", "train"), strict=True):
        shutil.copytree(place, flat / name)
    real = load_real(flat, CPU, SMALL)
    assert real.train.class_names == ("bus", "car", "train")
    assert len(real.train) + len(real.held_out) == 23 and real.test is None
    assert "train: taken as a class, beside bus, car;" in caplog.text
    # A stray image beside the folders of its classes makes none of it.
    stray = shutil.copytree(parts, tmp_path / "stray")
    shutil.copy(next((folder / NAMES[0]).iterdir()), stray / "train")
    (stray / "unlabeled").mkdir()
    assert real_data.has_parts(stray)
    # Other folders beside the parts of a set are none of its classes.
    more = shutil.copytree(parts, tmp_path / "more")
    (more / "annotations").mkdir()
    assert load_real(more, CPU, SMALL).train.class_names == NAMES


def test_idx_files_inside_train_are_refused_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(few_test_images(20), tmp_path / "train")
    with pytest.raises(UserError, match=r"got idx files in \S+/train, expected class folders"):
        load_real(tmp_path, CPU, SMALL)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "teacher",
            {"model": {"arch": "lenet5"}, "views": {"size": 64}},
            "model: cannot take 3 x 64 x 64 views",
        ),
        ("teacher", {"model": {"arch": "lenet_5"}}, "such as lenet5"),
        ("teacher", {"model": {"path": "x"}}, "model: got path, expected arch"),
        ("teacher", {"optim": {"name": "timm:muom", "lr": 1e-3}}, "did you mean timm:muon?"),
        ("denoiser", {"patch_size": 3}, "patch_size: got 3, expected a divisor of the images' 16"),
    ],
)
def test_wrong_settings_are_refused_before_an_image_is_read(
    kind: str,
    changes: dict[str, Any],
    words: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(real_data, "_decoded", lambda *_: pytest.fail("decoded"))
    own: dict[str, Any] = {"model": {"arch": "cifar_resnet8"}, "views": {"size": 16}}
    if kind == "denoiser":
        own = {"num_layers": 1, "num_heads": 2, "head_dim": 8}
    path, out = tmp_path / "job.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({"name": kind, **COMMON, **own, **changes}))
    command = ["pretrain", kind, str(path), f"run_dir={out}", "--data", str(folder)]
    assert cli.main(command) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_grids_show_some_of_many_classes(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    drawn: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(report_images, "MOST_ROWS", 2)
    monkeypatch.setattr(
        report_images, "grid", lambda images, names, path: drawn.append((len(images), names))
    )
    dit = {"patch_size": 4, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    pretrained("denoiser", dit, parts, tmp_path / "denoiser", capsys)
    assert drawn == [(2, ["ant", "bee"])] * 3
    few_step(tmp_path / "denoiser" / "model", tmp_path / "few")
    assert drawn[3:] == [(2, ["ant", "bee"])]


def test_a_job_that_fails_after_training_says_so_on_its_page(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(_: Any) -> None:
        raise UserError("nothing was learned")

    monkeypatch.setattr(scoring, "check_trained", fail)
    model = {"model": {"arch": "cifar_resnet8"}, "views": {"size": 16}}
    path, out = tmp_path / "job.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({"name": "teacher", **COMMON, **model}))
    command = ["pretrain", "teacher", str(path), f"run_dir={out}", "--data", str(parts)]
    assert cli.main(command) == 2
    assert "dmkd: nothing was learned" in capsys.readouterr().err
    facts = json.loads((out / "report.json").read_text())
    assert (facts["state"], facts["message"]) == ("failed", "UserError: nothing was learned")
    assert "<b>Ended with an error</b>" in (out / "report.html").read_text(encoding="utf-8")


def test_a_signal_after_training_says_how_to_go_on(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"model": {"arch": "cifar_resnet8"}, "views": {"size": 16}}
    path, out = tmp_path / "job.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({"name": "teacher", **COMMON, **model}))
    command = ["pretrain", "teacher", str(path), f"run_dir={out}", "--data", str(parts)]

    def stop(_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "check_trained", stop)
        assert cli.main(command) == 130
    line = f"to write its results, run it again with run_dir={out} --resume"
    assert line in capsys.readouterr().err and not (out / "model").exists()
    assert cli.main([*command, "--resume"]) == 0
    assert (out / "model" / "model.safetensors").is_file()
