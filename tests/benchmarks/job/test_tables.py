"""Tables of whole jobs say what single runs can show."""

from __future__ import annotations

from benchmarks.job import tables


def test_few_steps_are_charged_with_what_their_denoiser_cost() -> None:
    """Its 2,758.2 CPU s are repaid by 276 jobs that save 10 each, or by 28 that save 100."""
    text = tables.break_even([10.0, 100.0])
    assert (
        "3,240 s on one thread (2,758 CPU s)" in text and "repays that after 28 to 276 jobs" in text
    )
    assert "repays" not in tables.break_even([-1.0])


def test_runs_that_differ_are_said_to() -> None:
    rows = [
        {"arm": arm, "seed": 0, "wall_s": wall}
        for arm, wall in (("a", 100.0), ("b", 50.0), ("a", 150.0), ("b", 25.0), ("c", 1.0))
    ]
    assert "same arm took 1.5 to 2.0 times as long" in tables.drift(rows)
    assert tables.drift(rows[:2]) == ""


def test_gains_that_one_run_cannot_tell_are_called_noise() -> None:
    proof = {
        "sampler": "s",
        "attention": "a",
        "sampler_dtype": "d",
        "png_files": 0,
        "ops": {},
        "teacher_batch_norms": 0,
        "page_faults_per_step": 0,
        "compiled_graphs": 0,
    }
    same = {
        "seed": 0,
        "top1": 0.5,
        "images_per_s": 1.0,
        "views_per_s": 1.0,
        "s_to_target": None,
        "proof": proof,
        "environment": dict.fromkeys(("device", "threads", "torch", "date"), 1),
    }
    rows = [
        {"arm": arm, "after": after, "wall_s": wall, **same}
        for arm, after, wall in (("a", None, 100.0), ("b", "a", 90.0), ("c", "b", 60.0))
    ]
    text = tables.ladder(rows)
    assert "| 1.11x (noise) |" in text and "| 1.50x |" in text


def test_gains_of_several_seeds_are_noise_where_their_interval_contains_one() -> None:
    low, mean, high = tables.ratio_interval([2.0, 8.0])
    assert abs(mean - 4.0) < 1e-9 and abs(low * high - 16.0) < 1e-6 and low < 1 < high
    assert tables._gain(1.1, [1.10, 1.11, 1.09]) == "1.10x"
    assert tables._gain(1.5, [1.5, 0.9, 1.2]) == "1.50x (noise)"
    rows = [
        {"arm": "ours, default", "times_faster_than_fp32": f, "times_faster_than_bf16": None}
        for f in (6.0, 6.0, 6.0)
    ]
    text = tables.ratios(rows)
    assert "ours, default, vs fp32: 6.0x (6.0 to 6.0, 3 runs)" in text and "bf16" not in text
    assert tables.ratios(rows[:1]) == ""
