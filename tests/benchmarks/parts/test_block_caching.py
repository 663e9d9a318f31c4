"""The study of cheaper steps: every arm is measured, on record once, and in the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks.findings import generator_tables, study
from benchmarks.harness import read_rows
from benchmarks.parts import block_caching
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config

FIGURES = {
    "images_per_s": 100.0,
    "times_neither": 1.0,
    "times_diffusers": 2.0,
    "forwards": 16.0,
    "num_steps": 8,
    "frechet": 0.2,
}
STAMP = {"environment": {"device": "CPU", "date": "2026-01-01", "commit": "abc"}}


@pytest.mark.parametrize("arm", block_caching.ARMS)
def test_every_arm_is_a_config(arm: str) -> None:
    overrides = block_caching.ARMS[arm]
    load_config(DistillConfig, block_caching.CONFIGS / block_caching.CONFIG, overrides)
    assert overrides or arm == "neither"


@pytest.mark.slow
def test_the_study_at_a_tiny_size_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"COUNT": 1024, "VIEWS": 2560, "BATCH": 8, "COMPARED": 256}.items():
        monkeypatch.setattr(block_caching, name, value)
    for module in (study, block_caching.study):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path)
    fast = ["sampler.num_steps=2", "sampler.micro_batch_images=128"]
    monkeypatch.setattr(
        block_caching, "ARMS", {k: [*v, *fast] for k, v in block_caching.ARMS.items()}
    )
    command = ["--seeds", "1", "--n", "1", "--threads", "1", "--record"]
    command += ["--arms", "neither", "every 2"]
    block_caching.main(command)
    rows = read_rows("block-caching")
    assert [(r["arm"], r["seed"]) for r in rows] == [
        (arm, seed) for seed in (1, "quality") for arm in ("neither", "every 2")
    ]
    whole, cached = (r for r in rows if r["seed"] == "quality")
    assert whole["forwards"] == pytest.approx(4, abs=0.01)
    assert cached["forwards"] == pytest.approx(4 - 2 * 3 / 5, abs=0.1)  # 3 of 5 blocks, 1 step
    assert whole["compared"] == 256 and whole["frechet"] > 0
    block_caching.main(command)
    assert read_rows("block-caching") == rows
    assert "every 2" in generator_tables.block_caching(rows)


@pytest.mark.slow
def test_the_cost_of_a_guide_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_caching, "BATCH", 8)
    calls = []

    class Counted(block_caching.EntropyGuide):
        def __call__(self, image_estimate: Tensor, labels: Tensor, step: Tensor) -> Tensor:
            calls.append(step)
            return super().__call__(image_estimate, labels, step)

    found = block_caching.costs(["sampler.num_steps=2"], 1, guide=Counted())
    assert found["images_per_s"] > 0 and len(calls) == 2 * 3  # warm-up, timing, arithmetic


def rows_of(tops: dict[str, list[float]], **speeds: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for arm, found in tops.items():
        costs = FIGURES | {"times_diffusers": speeds.get(arm.replace(" ", "_"), 2.0)}
        rows.append({"arm": arm, "seed": "quality", **costs, **STAMP})
        for seed, top1 in enumerate(found, 1):
            figures = {"top1": top1 / 100, "images": 1, "views": 1, "cpu_s": 36.0}
            rows.append({"arm": arm, "seed": seed, **figures, **STAMP})
    return rows


def test_the_table_pairs_students_by_seed_and_names_the_fastest_arm_within_the_margin() -> None:
    tops = {"neither": [85.0, 86.0], "every 2": [84.9, 85.9], "every 3": [83.0, 85.0]}
    text = generator_tables.block_caching(rows_of(tops, every_2=2.3, every_3=4.0))
    half = 12.706 * 0.5
    assert "| every 2 | 16 | 100 | 1.00x | 2.30x | 0.200 |" in text
    assert "-0.10 ± 0.00 (2 seeds)" in text and f"-1.50 ± {half:.2f} (2 seeds)" in text
    assert "above -0.5 points: every 2, 2.30x diffusers (goal 2.2x, met)" in text
    assert "0.06 CPU hours" in text


def test_the_table_without_students_has_the_costs_alone() -> None:
    text = generator_tables.block_caching(rows_of({"neither": []}))
    assert "| neither | 16 | 100 |" in text and "seeds" not in text
