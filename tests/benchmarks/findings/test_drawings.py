"""The study of color drawings: how the script makes the folder, and the chain of commands."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.findings import drawings, study

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
    for number in range(30):
        save(source / "food" / "fruit" / f"{number}.png", size=(20, 10), color=(number, 0, 0))
    save(source / "food" / "copy.png", size=(20, 10), color=(0, 0, 0))
    save(source / "tools" / "fork.png", size=(9, 9), color=(0, 99, 0))
    save(source / "food" / "fork.png", size=(9, 9), color=(0, 99, 0))  # Of two classes.
    save(source / "plants" / "clear.png", size=(10, 20), color=(0, 0, 9, 0), mode="RGBA")
    save(source / "plants" / "large.png", size=(5_000, 4_000), color=(1, 1, 1))
    (source / "plants" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    script["main"](source, target)
    counts = {name: len([*target.glob(f"*/{name}/*.png")]) for name in script["CLASSES"]}
    assert {name: count for name, count in counts.items() if count} == {"food": 30, "plants": 1}
    assert 1 <= len([*target.glob("test/food/*")]) <= 12
    (clear,) = target.glob("*/plants/*.png")
    pixels = np.asarray(Image.open(clear))
    assert pixels.shape == (64, 64, 3) and (pixels == 255).all()
    wide = np.asarray(Image.open(next(target.glob("*/food/*.png"))))
    assert (wide[:15] == 255).all() and (wide[17:47] < 99)[..., 1:].all()
    told = capsys.readouterr().err
    assert "large.png" in told and "broken.png" in told


def test_the_table_says_the_ratio_of_generated_to_real() -> None:
    stamp = {"environment": {"device": "CPU", "date": "2026-01-01"}, "cpu_s": 1.0}
    rows: list[dict[str, Any]] = [{"part": "teacher", "test_top1": 0.75, **stamp}]
    for arm, top1 in (("real", 0.60), ("generated", 0.57)):
        for seed in (1, 2):
            figures = {"top1": top1 + seed / 100, "agreement": 0.5, "views": 100}
            rows.append({"part": "student", "arm": arm, "seed": seed, **figures, **stamp})
    text = drawings.drawings_table(rows)
    assert "| generated drawings | 58.50 ± " in text and "| -3.00 ± 0.00 (2 seeds) |" in text
    assert "generated over real: 0.951 (" in text and "Teacher: 75.00 %" in text


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
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row["part"] for row in rows] == [*lengths, "student", "student"]
    assert {row["part"]: row.get("views") for row in rows[:3]} == lengths
    assert [row.get("arm") for row in rows[3:]] == ["real", "generated"]
    assert all(row["views"] == 640 and row["cpu_s"] > 0 for row in rows[3:])
    assert drawings.drawings_table(rows)
    # A run whose row was lost goes on where it ended.
    lost, *kept = before.splitlines(keepends=True)
    (tmp_path / "drawings.jsonl").write_text("".join(kept), encoding="utf-8")
    drawings.main(call)
    again = json.loads((tmp_path / "drawings.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert again["test_top1"] == json.loads(lost)["test_top1"]
    before = (tmp_path / "drawings.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr(drawings, "dmkd", None)
    drawings.main(call)
    assert (tmp_path / "drawings.jsonl").read_text(encoding="utf-8") == before
