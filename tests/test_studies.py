"""The studies measure what they say: sets, students, fidelity figures, intervals, no cell twice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import finding_1, finding_2, study, study_tables


def small_set(count: int, *, seed: int = 0) -> study.FixedSet:
    """Test images, which a student can learn from at once."""
    test = study.test_images()
    part = slice(seed * count, (seed + 1) * count)
    return study.FixedSet(images=test.images[part], labels=test.labels[part])


def test_a_student_sees_exactly_the_set_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    real = study.FixedSet.sample

    def watched(self: study.FixedSet, ids: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        real(self, ids, *args, **kwargs)
        if self.next_id:  # Before that, a warm-up.
            seen.update(ids.tolist())

    monkeypatch.setattr(study.FixedSet, "sample", watched)
    torch.set_num_threads(1)
    row = study.train_student(
        small_set(2_100), teacher="lenet5", student="lenet5_half", num_views=12_800, seed=0,
        test=study.test_images(), **study.LENET,
    )  # fmt: skip
    assert row["images"] == 2_048 and seen == set(range(512, 2_048))
    assert 0.5 < row["top1"] < 0.85 and row["views"] == 12_800


def test_a_ring_lets_the_whole_stream_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    advance = study.FixedSet.advance
    monkeypatch.setattr(
        study.FixedSet, "advance", lambda self, n: (given.append(n), advance(self, n))[1]
    )
    torch.set_num_threads(1)
    study.train_student(
        small_set(4_096), teacher="lenet5", student="lenet5_half", num_views=6_400, seed=0,
        test=study.test_images(), capacity=1_024, **study.LENET,
    )  # fmt: skip
    assert sum(given) == 4_096


def test_a_cell_on_record_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path)
    cells = study.Cells("thing", record=True, num_threads=1)
    assert not cells.has(arm="real", seed=0)
    cells.add({"arm": "real", "seed": 0}, {"top1": 0.5, "cpu_s": 1.0})
    again = study.Cells("thing", record=True, num_threads=1)
    assert again.has(arm="real", seed=0) and not again.has(arm="real", seed=1)
    assert "top1" in capsys.readouterr().err


def test_generated_sets_grow_without_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "CACHE", tmp_path)
    settings = ["sampler.num_steps=1", "sampler.guidance_scale=1", "sampler.compile=false",
                "sampler.micro_batch_images=16", "num_threads=1"]  # fmt: skip
    whole = study.generated(48, settings)
    next(tmp_path.iterdir()).unlink()
    study.generated(16, settings)
    grown = study.generated(48, settings)
    assert torch.equal(whole.images, grown.images) and torch.equal(whole.labels, grown.labels)
    assert len(study.generated(32, settings).images) == 32


def test_precision_and_recall_of_points_that_are_known() -> None:
    torch.manual_seed(0)
    one = torch.randn(400, 4, dtype=torch.float64)
    other = torch.randn(400, 4, dtype=torch.float64)
    assert finding_2.covered(one, one) == 1.0
    assert finding_2.covered(one, other) > 0.85
    assert finding_2.covered(one + 100, other) == 0.0
    # A set that is half of the other covers half of it; all of it is covered.
    halves = torch.cat([one, one + 100])
    assert finding_2.covered(one, halves) == 1.0 and finding_2.covered(halves, one) == 0.5


@pytest.mark.parametrize("k, reach", [(1, -1.0), (2, -3.0), (3, -7.0)])
def test_balls_reach_to_the_kth_other_point(k: int, reach: float) -> None:
    """Points 0, 1, 3 and 7 on a line; the farthest place below them that a ball covers."""
    others = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    inside, outside = torch.tensor([[reach + 0.01]]), torch.tensor([[reach - 0.01]])
    assert finding_2.covered(inside, others, k=k) == 1.0
    assert finding_2.covered(outside, others, k=k) == 0.0
    if k == 3:  # the default, as in the paper
        assert finding_2.covered(inside, others) == 1.0
        assert finding_2.covered(outside, others) == 0.0


def test_cells_at_equal_compute_cost_the_same() -> None:
    spent = {
        finding_2.FORWARDS // finding_2.forwards(s, k) * finding_2.forwards(s, k)
        for s, k in finding_2.EQUAL_COMPUTE
    }
    assert spent == {finding_2.FORWARDS}
    assert finding_2.forwards(1.0, 4) == 4 and finding_2.forwards(4.0, 50) == 100


def test_intervals_are_those_of_students_t() -> None:
    """Two cells of three: means 80 and 90, pooled variance 1 over 4 degrees of freedom."""
    rows = [
        {"cell": c, "top1": (m + d) / 100} for c, m in (("a", 80), ("b", 90)) for d in (-1, 0, 1)
    ]
    grid = study_tables.Grid(rows, lambda r: r["cell"])
    assert grid.freedom == 4 and grid.deviation == pytest.approx(1.0)
    assert grid.half("a") == pytest.approx(2.776 / 3**0.5)
    assert grid.difference(["b"], ["a"]) == f"+10.00 ± {2.776 * (2 / 3) ** 0.5:.2f}"
    assert study_tables.t_975(24) == pytest.approx(2.0639, abs=1e-3)
    assert study_tables.t_975(10) == pytest.approx(2.2281, abs=4e-3)
    assert math.isnan(study_tables.t_975(0))


def test_tables_render_with_whatever_rows_exist() -> None:
    stamp = {"device": "CPU", "date": "2026-01-01"}
    one = {"arm": "real", "top1": 0.9, "agreement": 0.95, "views": 100, "environment": stamp}
    assert "| real training images (55,000) | 90.00 |  | 1 | 95.00 |" in study_tables.finding_1(
        [one]
    )
    cell = {"part": "grid", "guidance_scale": 1.0, "num_steps": 4, "seed": 0, "top1": 0.8,
            "images": 10, "views": 100, "cpu_s": 3600.0, "environment": stamp}  # fmt: skip
    text = study_tables.finding_2([cell])
    assert "| 1 | 80.00 |" in text and "1.00 CPU hours" in text


def test_teachers_are_compared_over_all_temperatures() -> None:
    stamp = {"device": "CPU", "date": "2026-01-01"}
    rows = [
        {"student": "s", "teacher": t, "temperature": k, "seed": seed, "top1": (m + seed) / 100,
         "views": 10, "environment": stamp}
        for t, m in (("weak", 80), ("strong", 70)) for k in (1.0, 4.0) for seed in (0, 1)
    ]  # fmt: skip
    text = study_tables.finding_3(rows)
    # Variance 1/2 in each cell, four degrees of freedom; each side is a mean of four.
    assert (
        f"weak less strong teacher over the temperatures of both: +10.00 ± {2.776 * 0.5:.2f}"
        in text
    )


def test_photo_crops_and_noise_are_what_they_are_called() -> None:
    crops = finding_1.crops_of_a_photo(256).double()
    assert 20 < crops.std(dim=(1, 2, 3)).mean() < 90
    assert len(crops.flatten(1).unique(dim=0)) == 256
    noise = finding_1.noise(512).double()
    assert abs(noise.mean() - 127.5) < 1 and abs(noise.std() - 73.9) < 1


def test_a_line_is_found_and_a_bend_is_told() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    intercept, slope, worst = study_tables.line(xs, [3 + 2 * x for x in xs])
    assert (intercept, slope) == (pytest.approx(3.0), pytest.approx(2.0)) and worst < 1e-9
    assert study_tables.line(xs, [x**2 for x in xs])[2] > 0.2
