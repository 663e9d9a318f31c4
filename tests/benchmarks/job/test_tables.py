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
    rows = [{"times_faster_than_fp32": f, "times_faster_than_bf16": None} for f in (2.0, 8.0)]
    assert tables._sooner(rows, "fp32").startswith("4.00x (0.00 to ")
    assert tables._sooner(rows[:1], "fp32") == "2.0x" and tables._sooner(rows, "bf16") == "-"


def test_few_steps_are_compared_with_many_by_seed() -> None:
    """Gaps of 1 and 2 points, and of 10 and 20 s less."""
    rows = [
        {"job": job, "seed": seed, "top1": top1, "wall_s": wall}
        for job, values in (
            ("many", ((0.80, 100.0), (0.70, 200.0))),
            ("few", ((0.81, 90.0), (0.72, 180.0))),
        )
        for seed, (top1, wall) in enumerate(values)
    ]
    text = tables.less(rows, ["many", "few"])
    assert (
        f"Few less many, paired by seed, ± 95 % interval: +1.50 ± {12.706 / 2:.2f} points" in text
    )
    assert f"-15.00 ± {12.706 * 5:.2f} s." in text
    assert tables.less(rows[:1] + rows[2:3], ["many", "few"]) == ""
