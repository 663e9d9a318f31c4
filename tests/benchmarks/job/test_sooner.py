"""Time to an accuracy: what a run that never reaches it counts as, and what an arm changes."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.job import sooner
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config


def rows() -> list[dict[str, Any]]:
    stamp = {"arguments": {"seeds": 2, "every": 10_000}}
    stamp["environment"] = dict.fromkeys(("device", "threads", "torch", "date"), 1)
    times = {
        sooner.SHIPPED: ((40.0, None), (50.0, 80.0)),
        sooner.OLDER: ((160.0, None), (None, None)),
        sooner.LONG: ((60.0, 120.0), (60.0, 140.0)),
    }
    return [
        {"arm": arm, "seed": seed, "top1": 0.9, "agreement": 0.9, "wall_s": 200.0, "cpu_s": 9.0}
        | {"s_to_target": found[0], "s_to_late": found[1], **stamp}
        for arm, both in times.items()
        for seed, found in enumerate(both)
    ]


def test_a_run_that_never_reaches_it_counts_with_all_its_time() -> None:
    text = sooner.sooner_table(rows())
    # 160 / 40 and 200 / 50.
    assert "comes 4.00x (4.00 to 4.00) as soon" in text
    first, *_ = [line for line in text.splitlines() if line.startswith(f"| {sooner.OLDER} |")]
    assert first.endswith("| 200 | 9 | - (1 of 2 reach it) | - (0 of 2 reach it) |")
    late = [r | {"s_to_target": None} if r["arm"] == sooner.SHIPPED else r for r in rows()]
    assert "as soon" not in sooner.sooner_table(late)
    assert f"| {sooner.LONG} | 2 | 0.9000 | 0.9000 | 200 | 9 | 60 | 130 |" in text


def test_arms_differ_from_the_shipped_settings_as_they_say() -> None:
    shipped, older, long = (
        load_config(DistillConfig, sooner.CONFIG, sooner.ARMS[arm])
        for arm in (sooner.SHIPPED, sooner.OLDER, sooner.LONG)
    )
    assert older.optim.name == "adamw" and shipped.optim.name == long.optim.name == "muon"
    assert older.train.num_views == long.train.num_views == sooner.OLDER_VIEWS
    for part in ("denoiser", "sampler", "student"):
        assert getattr(shipped, part) == getattr(older, part) == getattr(long, part)
    assert long.optim == shipped.optim and long.more_teachers == shipped.more_teachers


@pytest.mark.slow
def test_a_short_job_is_run_and_its_times_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["train.num_views=1024", "ring.min_fill_images=512", "ring.samples_per_insert=1"]
    monkeypatch.setitem(sooner.ARMS, sooner.SHIPPED, short)
    monkeypatch.setattr(sooner, "TARGET", 0.0)
    row = sooner.run(sooner.SHIPPED, 3, 512)
    assert len(row["curve"]) == 2
    assert row["curve"][-1] == pytest.approx(row["top1"], abs=0.01)  # of the saved student
    assert 0 < row["s_to_target"] < row["wall_s"] and row["s_to_late"] is None
