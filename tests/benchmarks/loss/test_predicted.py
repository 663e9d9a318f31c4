"""The speed that builds of the loss predict: recorded, below it the goals, and on its page."""

from __future__ import annotations

import json

import pytest
from small_jobs import ROOT

from benchmarks.loss import predicted
from benchmarks.loss.kd_loss_gpu import MOST_LAUNCH, SHAPES

GOLDEN = json.loads(predicted.GOLDEN.read_text(encoding="utf-8"))
BUILDS = ROOT / "tests" / "golden" / "kd_loss_kernels.json"


@pytest.mark.parametrize("case", predicted.CASES, ids=str)
def test_recorded_predictions_follow_from_the_builds(case: tuple[int, str]) -> None:
    recorded = dict(GOLDEN[predicted.key(*case)])
    build = recorded.pop("build")
    assert recorded == predicted.predict(*case, build)
    kernel = json.loads(BUILDS.read_text(encoding="utf-8"))[
        f"sm_90 {predicted.key(*case)} one_pass"
    ]
    for name in ("registers", "shared", "warps"):
        assert build[name] == kernel[name], name
    assert recorded["blocks_per_sm"] * build["warps"] * 32 * build["registers"] <= 65536
    size = predicted.BYTES[case[1]]
    assert 3 * size <= recorded["bytes_per_logit"] <= 5 * size
    assert 0 < recorded["share_of_copy"] <= 1


def test_goals_are_within_reach_and_every_large_shape_has_one() -> None:
    for rows, classes in SHAPES:
        for dtype in predicted.BYTES:
            goal = predicted.goal(classes, dtype)
            if rows * classes >= MOST_LAUNCH:
                assert goal is not None
                assert goal < GOLDEN[predicted.key(classes, dtype)]["share_of_copy"]
    assert predicted.goal(12345, "float32") is None


def test_long_rows_move_more_bytes_the_longer_they_are() -> None:
    """By hand: 2 programs on 132 SMs hold 264 rows of 128,256 bfloat16 logits of both networks."""
    build = GOLDEN["C=128256 bfloat16"]["build"]
    found = predicted.predict(128256, "bfloat16", build)
    held = found["blocks_per_sm"] * 132 * 2 * 128256 * 2
    assert found["bytes_per_logit"] == pytest.approx(2 * (5 - 2 * 30e6 / held), abs=0.01)
    assert predicted.predict(16000, "bfloat16", build)["bytes_per_logit"] == 6


def test_the_page_shows_the_prediction() -> None:
    page = (ROOT / "docs" / "results" / "performance.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- predicted -->\n")[2].partition("<!-- end predicted -->")[0]
    assert shown.strip() == predicted.table()
