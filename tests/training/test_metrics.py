"""Rows of statistics: their rates and times, TensorBoard events, and what a crash leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from dmkd_fast.runtime import files
from dmkd_fast.runtime.output.progress import Progress
from dmkd_fast.training.metrics import Metrics


def test_a_row_continues_the_views_images_and_time_of_the_run(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Progress(show=False))
    metrics.begin(views=160, wall_s_before=1000.0, images=32)
    row = metrics.flush(views=320, images=48)
    metrics.close()
    assert 1000 <= row["wall_s"] < 1100
    assert row["views_per_s"] / row["images_per_s"] == pytest.approx(160 / 16)
    assert json.loads((tmp_path / "stats.jsonl").read_text(encoding="utf-8")) == row


def test_events_are_those_of_the_rows_and_a_resumed_run_replaces_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    now = time.time
    rows = []
    for hour, start in enumerate((0, 160)):
        # Files of events are read in the order of their times in seconds.
        monkeypatch.setattr(time, "time", lambda hour=hour: now() + 3600 * hour)
        metrics = Metrics(tmp_path, Progress(show=False))
        metrics.begin(views=start, images=0)
        for views in range(start + 160, 480, 160):
            metrics.add("loss", torch.tensor(1000.0 * hour + views))
            rows.append(metrics.flush(views=views, images=views // 4, lr=0.25))
        metrics.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["scalars"]) == rows[0].keys() - {"views"}
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (160, 160),
        (320, 1320),
    ]
    for name in rows[0].keys() - {"views"}:
        found = [(event.step, event.value) for event in read.Scalars(name)]
        expected = [
            (row["views"], pytest.approx(row[name], rel=1e-6)) for row in (rows[0], rows[2])
        ]
        assert found == expected, name


def test_a_checkpoint_counts_rows_that_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    metrics = Metrics(tmp_path, Progress(show=False))
    assert metrics.state_dict()["written"]() == 0 and synced == []  # before `begin`
    metrics.begin(views=0)
    metrics.flush(views=160)
    path = tmp_path / "stats.jsonl"
    assert metrics.state_dict()["written"]() == path.stat().st_size > 0
    assert synced == [path]
    metrics.close()
