"""The measurement of views compares equal work, and ends with its JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import render

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_views_benchmark_ends_with_one_json_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "views", "--quick", "--n", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "views" and not line["goals"]  # those are of the large images
    timed = {(row["arm"], row["set"]) for row in line["rows"] if row["device"] == "cpu"}
    assert timed >= {
        ("ours", "fresh"),
        ("ours", "reused"),
        ("eager", "fresh"),
        ("copy", "fresh"),
        ("torchvision", "fresh"),
        ("torchvision", "reused"),
    }
    assert all(row["images_per_s"] > 0 for row in line["rows"])
    timing = next(r for r in line["rows"] if r["arm"] == "ours" and r["set"] == "fresh")
    for row in line["rows"]:
        row["environment"] = line["environment"]
    assert f"| 32 -> 32 | float32 | {timing['images_per_s']:,} |" in render.TABLES["views"](
        line["rows"]
    )


def test_all_arms_of_the_views_benchmark_make_such_views() -> None:
    """The same shape and range of numbers: black borders and white pixels are in each batch."""
    from benchmarks.parts import views

    mean, std = torch.tensor(views.MEAN), torch.tensor(views.STD)
    for arm, call in views.arms("32 -> 32", torch.float32, torch.device("cpu")).items():
        made = call()
        if arm == "DALI":
            made = torch.from_numpy(made[0].as_array()).permute(0, 3, 1, 2)  # type: ignore[index]
        assert isinstance(made, torch.Tensor) and made.shape == (views.BATCH, 3, 32, 32), arm
        if not arm.startswith("copy"):
            for got, pixel in ((made.amin((0, 2, 3)), 0), (made.amax((0, 2, 3)), 1)):
                torch.testing.assert_close(got, (pixel - mean) / std, rtol=0, atol=1e-4, msg=arm)
