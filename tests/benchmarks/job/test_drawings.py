"""The study of color drawings: how the script makes the folder, and the chain of commands."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.findings import study
from benchmarks.job import drawings

ROOT = Path(__file__).parents[3]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # The script sets it.
    return runpy.run_path(str(ROOT / "examples" / "clipart.py"))


def save(path: Path, *, size: tuple[int, int], color: tuple[int, ...], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.mark.filterwarnings("ignore")
def test_the_folder_has_whole_drawings_on_white_once_each(
    tmp_path: Path, script: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "png", tmp_path / "data"
    for number, folder in enumerate(script["CLASSES"].values()):
        save(source / folder / "own.png", size=(9, 9), color=(9, 9, number))
    fruit = [source / "food" / "fruit" / f"{number}.png" for number in range(30)]
    for number, path in enumerate(fruit):
        save(path, size=(20, 10), color=(number, 0, 0))
    (source / "food" / "copy.png").write_bytes(fruit[0].read_bytes())
    save(source / "tools" / "fork.png", size=(9, 9), color=(0, 99, 0))
    save(source / "food" / "fork.png", size=(9, 9), color=(0, 99, 0))  # Of two classes.
    save(source / "plants" / "clear.png", size=(10, 20), color=(0, 0, 9, 0), mode="RGBA")
    save(source / "plants" / "large.png", size=(5_000, 4_000), color=(1, 1, 1))
    (source / "plants" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    script["main"](source, target)
    counts = {name: len([*target.glob(f"*/{name}/*.png")]) for name in script["CLASSES"]}
    assert counts == dict.fromkeys(counts, 1) | {"food": 31, "plants": 2}
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (source / "food").rglob("*.png")
    ]
    tested = {digest[:16] for digest in digests if int(digest[-8:], 16) % 6 == 0}
    fork = hashlib.sha256((source / "food" / "fork.png").read_bytes()).hexdigest()[:16]
    assert {path.stem for path in target.glob("test/food/*")} == tested - {fork}
    pictures = [np.asarray(Image.open(path)) for path in target.glob("*/*/*.png")]
    assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    assert sum((picture == 255).all() for picture in pictures) == 1  # the transparent one
    digest = hashlib.sha256(fruit[0].read_bytes()).hexdigest()[:16]
    (wide,) = (np.asarray(Image.open(path)) for path in target.glob(f"*/food/{digest}.png"))
    assert (wide[:15] == 255).all() and (wide[17:47] == 0).all()
    told = capsys.readouterr().err
    assert all(name in told for name in ("large.png", "broken.png"))
    with pytest.raises(SystemExit, match="exists already"):
        script["main"](source, target)
    with pytest.raises(SystemExit, match="no drawings"):
        script["main"](source / "food", tmp_path / "other")
    script["main"].__globals__["MOST_IMAGES"] = 5
    script["main"](source, tmp_path / "few")
    assert len([*(tmp_path / "few").glob("*/food/*.png")]) == 5


def rows() -> list[dict[str, Any]]:
    stamp = {"environment": {"device": "CPU", "date": "2026-01-01"}, "cpu_s": 1.0}
    found: list[dict[str, Any]] = [{"part": "teacher", "test_top1": 0.75, **stamp}]
    for seed in (1, 2):
        for arm, top1 in (("real", 0.60), ("generated", 0.57)):
            figures = {"top1": top1 + seed / 100, "agreement": 0.5, "views": 100}
            found.append({"part": "student", "arm": arm, "seed": seed, **figures, **stamp})
    return found


def test_the_table_says_the_ratio_of_generated_to_real() -> None:
    text = drawings.drawings_table(rows())
    assert "| generated drawings | 58.50 | 0.71 | 2 | 50.0 | -3.00 ± 0.00 (2 seeds) |" in text
    assert "generated over real: 0.951 (" in text and "Teacher: 75.00 %" in text
    # A stopped study has a table, too.
    for count in range(1, len(rows())):
        assert "| student sees |" in drawings.drawings_table(rows()[:count])
    marked = [*rows(), {**rows()[1], "top1": 0.1, "superseded": "one seed"}]
    marked += [{**row, "seed": 3} for row in rows()[1:3]]
    assert "| real training drawings | 61.33 |" in drawings.drawings_table(marked)


def test_both_students_have_the_same_settings_but_for_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def recorded(folder: Path, *command: str) -> dict[str, Any]:
        commands.append(command)
        if command[0] == "init":
            (folder / "denoiser.yaml").write_text("data: {image_size: 24}", encoding="utf-8")
        return defaultdict(float)

    monkeypatch.setattr(study, "CACHE", tmp_path)
    monkeypatch.setattr(drawings, "dmkd", recorded)
    data = str(tmp_path / "data")
    drawings.main(["--data", data, "--seeds", "2"])
    init, teacher, denoiser, fewstep, *students = commands
    assert init == ("init", "own-data", "--data", data)
    assert teacher[:3] == ("pretrain", "teacher", "teacher.yaml") and teacher[-1] == data
    assert denoiser[:3] == ("pretrain", "denoiser", "denoiser.yaml") and denoiser[-1] == data
    assert fewstep[:3] == ("pretrain", "fewstep", "fewstep.yaml") and data not in fewstep
    assert len(students) == 4
    for seed, (real, generated) in enumerate((students[:2], students[2:]), 1):
        shared = set(real) & set(generated)
        assert shared >= {"distill", f"seed={seed}", "train.num_views=40000"}
        assert set(generated) - shared == {f"run_dir=runs/generated-{seed}"}
        images = {f"source.path={data}/train", "source.image_size=24"}
        no_denoiser = {"denoiser=null", "sampler=null"}
        assert set(real) - shared == {f"run_dir=runs/real-{seed}"} | images | no_denoiser


@pytest.mark.slow
def test_the_chain_goes_from_a_folder_to_both_students_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 300), ("test", 4)):
        for name, color in (("dark", 60), ("light", 200)):
            for number in range(count):
                path = tmp_path / "data" / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(color - 50, color + 50, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    monkeypatch.setattr(study, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path)
    lengths = {"teacher": 640, "denoiser": 320, "fewstep": 512}
    monkeypatch.setattr(drawings, "LENGTHS", lengths)
    call = ["--data", str(tmp_path / "data"), "--record", "--seeds", "1", "--views", "640"]
    drawings.main(call)
    before = (tmp_path / "drawings.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in before.splitlines()]
    assert [row["part"] for row in found] == [*lengths, "student", "student"]
    assert {row["part"]: row.get("views") for row in found[:3]} == lengths
    assert [row.get("arm") for row in found[3:]] == ["real", "generated"]
    assert all(row["generated_images"] >= 512 for row in found[3:])
    assert all(row["views"] == 640 and row["cpu_s"] > 0 for row in found[3:])
    assert drawings.drawings_table(found)
    # A run whose row was lost goes on where it ended.
    lost, *kept = before.splitlines(keepends=True)
    (tmp_path / "drawings.jsonl").write_text("".join(kept), encoding="utf-8")
    drawings.main(call)
    again = json.loads((tmp_path / "drawings.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    for name in ("test_top1", "cpu_s"):
        assert again[name] == json.loads(lost)[name]
    before = (tmp_path / "drawings.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr(drawings, "dmkd", None)
    drawings.main(call)
    assert (tmp_path / "drawings.jsonl").read_text(encoding="utf-8") == before
