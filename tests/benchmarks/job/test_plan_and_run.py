"""A plan and the run that follows it are compared, in all and by part."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import CONFIG, SHORT


def test_an_error_is_a_fraction_of_what_the_run_took() -> None:
    from benchmarks.job.plan import error

    assert error(90.0, 120.0) == error(150.0, 120.0) == 0.25


@pytest.mark.slow
def test_prediction_and_run_are_of_the_same_job() -> None:
    from benchmarks.job.plan import error, plan_and_run

    row = plan_and_run(Path(CONFIG), [*SHORT])
    assert row["error"] == pytest.approx(error(row["predicted_s"], row["wall_s"]), abs=0.02)
    assert sum(row["predicted_parts_s"].values()) == pytest.approx(row["predicted_s"], abs=0.5)
    assert row["parts_s"]["whole"] == pytest.approx(row["wall_s"], abs=0.5)
    assert row["parts_s"].keys() >= {"generate", "teacher", "student", "evaluate"}
