"""The studies measure what they say: sets, students, fidelity figures, no cell twice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from likeness import likeness

from benchmarks.findings import finding_1, finding_2, study, tables
from dmkd_fast import RingBuffer
from dmkd_fast.runtime import device


def small_set(count: int, *, seed: int = 0) -> study.FixedSet:
    """Test images, which a student can learn from at once."""
    test = study.test_images()
    part = slice(seed * count, (seed + 1) * count)
    return study.FixedSet(images=test.images[part], labels=test.labels[part])


def test_a_student_sees_exactly_the_set_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    real = study.FixedSet.write

    def watched(self: study.FixedSet, ids: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        real(self, ids, *args, **kwargs)
        if self.next_id:  # Before that, a warm-up.
            seen.update(ids.tolist())

    monkeypatch.setattr(study.FixedSet, "write", watched)
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    trainer = study.StudentTrainer
    dtypes: list[torch.dtype] = []

    def made(*args: Any, dtype: torch.dtype) -> Any:
        dtypes.append(dtype)
        return trainer(*args, dtype=dtype)

    monkeypatch.setattr(study, "StudentTrainer", made)
    torch.set_num_threads(1)
    row = study.train_student(
        small_set(2_100),
        teacher="lenet5",
        student="lenet5_half",
        num_views=12_800,
        seed=0,
        recipe={**study.RECIPES["lenet5_half"], "dtype": "float32"},
    )
    assert (row["dtype"], dtypes) == ("float32", [torch.float32])
    assert row["images"] == 2_048 and seen == set(range(512, 2_048))
    assert 0.5 < row["top1"] < 0.85 and row["views"] == 12_800


def test_a_ring_of_n_holds_n_images_and_lets_the_whole_stream_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[int] = []
    advance = study.FixedSet.advance
    monkeypatch.setattr(
        study.FixedSet, "advance", lambda self, n: (given.append(n), advance(self, n))[1]
    )
    rings: list[RingBuffer] = []
    monkeypatch.setattr(
        study, "RingBuffer", lambda *a, **kw: (rings.append(RingBuffer(*a, **kw)), rings[-1])[1]
    )
    torch.set_num_threads(1)
    study.train_student(
        small_set(4_096),
        teacher="lenet5",
        student="lenet5_half",
        num_views=6_400,
        seed=0,
        capacity=1_024,
    )
    assert sum(given) == 4_096
    assert [ring.num_filled for ring in rings] == [1_024]


def test_a_cell_on_record_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path)
    options = argparse.Namespace(record=True, threads=1, selects=())
    cells = study.Cells("thing", options)
    assert not cells.has(arm="real", seed=0)
    cells.add({"arm": "real", "seed": 0}, {"top1": 0.5, "cpu_s": 1.0})
    again = study.Cells("thing", options)
    assert again.has(arm="real", seed=0) and not again.has(arm="real", seed=1)
    (row,) = again.rows
    assert row["arguments"] == {"threads": 1}
    row["superseded"] = "one seed"
    (tmp_path / "thing.jsonl").write_text(json.dumps(row) + "\n")
    assert not study.Cells("thing", options).has(arm="real", seed=0)
    assert "top1" in capsys.readouterr().err


def test_generated_sets_grow_without_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "CACHE", tmp_path)
    settings = [
        "sampler.num_steps=1",
        "sampler.guidance_scale=1",
        "sampler.compile=false",
        "sampler.micro_batch_images=16",
        "num_threads=1",
    ]
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


@pytest.mark.parametrize(("k", "reach"), [(1, -1.0), (2, -3.0), (3, -7.0)])
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


@torch.no_grad()
def test_no_student_starts_like_a_teacher() -> None:
    """Trained teachers keep so much of their initial weights that a common seed shows."""
    for name in study.EMBEDDED_TEACHERS:
        teacher, spec = study.load_teacher(name)
        for student in study.STUDENTS:
            for seed in study.student_seeds(5):
                assert likeness(study.new_student(student, seed, spec)[0], teacher) < 5
        # Seed 0, which the teachers have, is what this would find.
        if name in ("weak", "lenet5"):
            assert likeness(study.new_student("lenet5_half", 0, spec)[0], teacher) > 6


def test_photo_crops_and_noise_are_what_they_are_called() -> None:
    crops = finding_1.crops_of_a_photo(256).double()
    assert 20 < crops.std(dim=(1, 2, 3)).mean() < 90
    assert len(crops.flatten(1).unique(dim=0)) == 256
    noise = finding_1.noise(512).double()
    assert abs(noise.mean() - 127.5) < 1 and abs(noise.std() - 73.9) < 1


def test_each_sample_of_images_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        study, "generated", lambda count, settings, **_: (asked.append(settings), small_set(512))[1]
    )
    monkeypatch.setattr(study, "train_student", lambda *_, **__: {"top1": 0.5})
    cells = study.Cells("thing", argparse.Namespace(record=False, threads=1, selects=()))
    finding_2.samples(cells, 4, 2)
    assert len(cells.rows) == 4 * 2 * 2 * 2
    assert {settings[-1] for settings in asked} == {f"seed={n}" for n in (1, 2, 3, 4)}
    assert len({tuple(settings) for settings in asked}) == 8


def test_procedural_images_are_those_of_a_job() -> None:
    images = finding_1.procedural(600)
    assert images.shape == (600, 1, 28, 28) and len(images.flatten(1).unique(dim=0)) > 595
    assert torch.equal(finding_1.procedural(50), images[:50])


def test_long_trainings_see_as_many_generated_images_as_real_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, int, int]] = []

    def images(arm: str, data: Path, count: int = 0) -> study.FixedSet:
        del data
        seen.append((arm, count, 0))
        return small_set(512)

    def trained(images: study.FixedSet, **settings: Any) -> dict[str, Any]:
        seen[-1] = (*seen[-1][:2], settings["num_views"])
        is_long = settings["num_views"] == tables.LONG_VIEWS
        assert settings["recipe"] == (finding_1.LONG_RECIPE if is_long else None)
        return {"top1": 0.9}

    monkeypatch.setattr(finding_1, "arm_images", images)
    monkeypatch.setattr(study, "train_student", trained)
    monkeypatch.setattr(study, "generated", lambda *_, **__: small_set(512))
    monkeypatch.setattr(finding_1, "PRIORS_SEEDS", 1)
    finding_1.main(["--data", "DIR", "--seeds", "1", "--long-seeds", "2"])
    assert [s[0] for s in seen[:6]] == list(finding_1.ARMS)
    assert {s[1:] for s in seen[:6]} == {(30_720, tables.VIEWS)}
    long = tables.LONG_VIEWS
    pair = [("diffusion", 54_784, long), ("real", 54_784, long)]
    assert seen[6:] == [*pair, ("priors", 54_784, long), *pair]
    assert 0 <= 55_000 - finding_1.LONG_COUNT < study.BLOCK
    _, is_shown, _ = tables.STUDY_TABLES["finding-1-long"]
    assert is_shown({"views": long}) and not is_shown({"views": tables.VIEWS})
