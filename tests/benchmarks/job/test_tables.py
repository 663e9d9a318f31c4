"""Tables of whole jobs say what single runs can show."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.job import end_to_end, tables
from benchmarks.job.arms import (
    CHANNELS_LAST,
    COMPILED,
    DEFAULT,
    EQUAL,
    FEW_STEPS,
    OUR_RECIPE,
    TARGET,
)


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
    rows = [
        {"arm": DEFAULT, "times_faster_than_fp32": factor, "times_faster_than_bf16": None}
        for factor in (2.0, 8.0)
    ]
    assert end_to_end._sooner(rows, "fp32").startswith("4.00x (0.00 to ")
    assert end_to_end._sooner(rows[:1], "fp32") == "2.0x"
    assert end_to_end._sooner(rows, "bf16") == "-"


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


# Seconds to the target, of generation and of training, and CPU seconds and views.
WHOLE = {
    TARGET: (600.0, 300.0, 300.0, 1200.0, 200_000),
    CHANNELS_LAST: (300.0, 150.0, 160.0, 600.0, 200_000),
    COMPILED: (400.0, 140.0, 160.0, 600.0, 200_000),
    OUR_RECIPE: (200.0, 150.0, 90.0, 500.0, 120_064),
    EQUAL: (150.0, 50.0, 100.0, 400.0, 200_000),
    FEW_STEPS: (120.0, 10.0, 100.0, 300.0, 200_000),
    DEFAULT: (60.0, 10.0, 60.0, 200.0, 120_064),
}


def whole(*left_out: str, **changes: Any) -> list[dict[str, Any]]:
    """Rows of whole jobs; with seed 1 they take twice as long. Changes are of one compiled row."""
    stamp = {"environment": dict.fromkeys(("device", "threads", "torch", "date"), 1)}
    others = dict.fromkeys(name for name, _ in end_to_end.MEDIANS.values())
    rows = [
        dict.fromkeys(others, 1.0)
        | {"arm": arm, "seed": seed, "top1": 0.9, "target": 0.89, "resolution_s": 9.0}
        | {"s_to_target": to_target * (1 + seed), "generation_s": generation, "cpu_s": cpu}
        | {"training_s": training, "views": views, "images": 10_240}
        | {"times_faster_than_fp32": 600 / to_target, "times_faster_than_bf16": 300 / to_target}
        | {"times_faster_than_our_recipe": 200 / to_target, **stamp}
        for arm, (to_target, generation, training, cpu, views) in WHOLE.items()
        for seed in range(2)
        if arm not in left_out
    ]
    return [row | changes if row["arm"] == COMPILED and row["seed"] == 1 else row for row in rows]


def test_whole_jobs_are_compared_with_the_recipe_of_both_sides_and_split_by_cause() -> None:
    text = end_to_end.end_to_end_table(whole())
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "| vs fp32 | vs the faster bf16 | vs bf16 with our recipe |" in text
    assert lines[DEFAULT].endswith("| 90 | 10.00x | 5.00x | 3.33x |")
    assert lines[OUR_RECIPE].endswith("| 3.00x | 1.50x | 1.00x |")
    # The faster bfloat16 baseline over either is at most 1: no figure. The true ratio is below.
    assert lines[CHANNELS_LAST].endswith("| 2.00x | - | 0.67x |")
    assert lines[COMPILED].endswith("| 1.50x | - | 0.50x |")
    assert "Compiled, the bf16 baseline is there 0.75x as soon as not compiled." in text
    views = f'200,000 (120,064 in "{OUR_RECIPE}" and "{DEFAULT}") views'
    assert f"10,240 images and {views}; 2 seeds" in text
    for said in (
        "generation by our sampler 150 to 50 s (3.0x)",
        "training at equal settings 160 to 100 s (1.6x)",
        "generation with fewer forwards 50 to 10 s (5.0x)",
        "time to the target by our recipe 180 to 90 s (2.0x)",
        # The few-step arm at equal views, and not the default of another length.
        "A job with it takes 100 CPU s less",
    ):
        assert said in text


def test_whole_jobs_of_two_cpus_are_two_tables_below_their_common_ratios() -> None:
    other = {"environment": dict.fromkeys(("device", "threads", "torch", "date"), 2)}
    later = [row | {"s_to_target": 3 * row["s_to_target"]} | other for row in whole()]
    for row in later:
        row["times_faster_than_fp32"] *= 4
    text = end_to_end.end_to_end_table([*whole(), *later])
    ratios, new, old = re.split(r"(?<=\n)\n(?=\| way)", text)
    assert new == end_to_end.end_to_end_table(later)
    assert old == end_to_end.end_to_end_table(whole())
    # 10, 10, 40, 40: geometric mean 20, log deviation 0.80, t of three degrees of freedom 3.18.
    assert f"| {DEFAULT} | 20.00x (5.60 to 71.46) | 5.00x | 3.33x |" in ratios
    assert "4 runs on 2 CPUs together" in ratios


def test_whole_jobs_without_some_arms_or_times_say_what_is_known() -> None:
    text = end_to_end.end_to_end_table(whole(OUR_RECIPE, FEW_STEPS))
    assert "with our recipe" not in text and "by our recipe" not in text
    assert "training at equal settings" in text and "fewer forwards" not in text
    # The default trains on fewer views, so what it saves is not the denoiser's.
    assert "which no row counts." in text and "CPU s less" not in text
    never = whole(s_to_target=None, times_faster_than_fp32=None)
    text = end_to_end.end_to_end_table(never)
    assert "Compiled, the bf16 baseline is there" not in text
    assert "| - (1 of 2 reach it) | - (1 of 2 reach it) | - |" in text
