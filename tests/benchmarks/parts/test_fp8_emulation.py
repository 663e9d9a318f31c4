"""The emulation of products in 8 bits: its rows, and their table."""

from __future__ import annotations

import json

import pytest

from benchmarks.parts import fp8_emulation, tables
from dmkd_fast.jobs import resolve


@pytest.mark.slow
def test_rows_compare_the_same_images_in_three_precisions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fp8_emulation, "JOBS", {"few steps": "fashion_mnist.yaml"})
    refuses = resolve.check_fp8
    fp8_emulation.main(["--images", "300"])
    assert resolve.check_fp8 is refuses
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["images"] == 300 and "top1_fp8" not in row
    assert 0 < row["levels_float32"] < row["levels_fp8"] < 10
    assert 0 < row["within_8_levels_fp8"] < row["within_8_levels_float32"] <= 1
    assert all(0 < row[f"frechet_{arm}"] < 2 for arm in fp8_emulation.ARMS)


def test_a_student_that_was_not_run_has_no_accuracy_in_the_table() -> None:
    row = {"job": "few steps", "images": 300, "levels_float32": 0.1, "levels_fp8": 0.6}
    row |= {f"frechet_{arm}": 0.2 for arm in fp8_emulation.ARMS}
    row["environment"] = {
        "date": "2026-11-25",
        "device": "CPU x",
        "threads": 1,
        "torch": "2.14.1",
        "commit": "0",
    }
    assert tables.fp8_emulation([row]).count("not run") == 2
    text = tables.fp8_emulation([row | {"top1_bf16": 0.86, "top1_fp8": 0.85}])
    assert "0.8500" in text and "not run" not in text and "0.600" in text
