"""Rows of a run in Weights & Biases and MLflow, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmkd_fast import Distiller


def trained(make_distiller: Callable[..., Distiller], on_row: Any) -> list[dict[str, Any]]:
    distiller = make_distiller()
    distiller.on_row.append(on_row)
    distiller.fit()
    lines = (distiller.run_dir / "stats.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_weights_and_biases(make_distiller: Callable[..., Distiller], tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from dmkd_fast.integrations.wandb import rows

    on_row = rows(mode="offline", project="kd", dir=str(tmp_path))
    written = trained(make_distiller, on_row)
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["views"] == written[-1]["views"] and summary["loss"] == written[-1]["loss"]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow(
    make_distiller: Callable[..., Distiller], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    from dmkd_fast.integrations.mlflow import rows

    mlflow.set_tracking_uri(tmp_path.as_uri())
    written = trained(make_distiller, rows("kd"))
    run = mlflow.active_run().info.run_id
    mlflow.end_run()
    found = mlflow.MlflowClient().get_metric_history(run, "loss")
    assert [(point.step, point.value) for point in found] == [
        (row["views"], row["loss"]) for row in written
    ]
