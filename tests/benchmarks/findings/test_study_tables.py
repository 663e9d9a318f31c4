"""Tables of the studies: intervals, paired differences, and whatever rows there are."""

from __future__ import annotations

import math

import pytest

from benchmarks.findings import finding_1, finding_2, generator_tables, tables


def test_intervals_are_those_of_students_t() -> None:
    """Two cells of three: means 80 and 90, pooled variance 1 over 4 degrees of freedom."""
    rows = [
        {"cell": c, "top1": (m + d) / 100} for c, m in (("a", 80), ("b", 90)) for d in (-1, 0, 1)
    ]
    grid = tables.Grid(rows, lambda r: r["cell"])
    assert grid.freedom == 4 and grid.deviation == pytest.approx(1.0)
    assert grid.half("a") == pytest.approx(2.776 / 3**0.5)
    # Cells of one seed err together: with seeds there are 2 degrees of freedom, not 4.
    for number, row in enumerate(rows):
        row["seed"] = number % 3
    assert tables.Grid(rows, lambda r: r["cell"]).half("a") == pytest.approx(4.303 / 3**0.5)
    assert tables.t_975(24) == pytest.approx(2.0639, abs=1e-3)
    assert tables.t_975(10) == pytest.approx(2.2281, abs=4e-3)
    assert math.isnan(tables.t_975(0))


def test_differences_are_paired_by_the_seeds_that_both_have() -> None:
    """What a seed does to both cells cancels: gaps of 1, 2 and 3 among accuracies of 60 to 90."""
    top1 = {"a": (60, 75, 90), "b": (61, 77, 93), "c": (50, 50)}
    rows = [
        {"cell": c, "seed": seed, "top1": value / 100}
        for c, values in top1.items()
        for seed, value in enumerate(values)
    ]
    grid = tables.Grid(rows, lambda r: r["cell"])
    assert grid.difference(["b"], ["a"]) == f"+2.00 ± {4.303 / 3**0.5:.2f} (3 seeds)"
    # Means over cells are taken seed by seed; the third seed is not in all cells.
    gaps = (61 - 55.0, 77 - 62.5)
    half = 12.706 * abs(gaps[1] - gaps[0]) / 2
    mean = sum(gaps) / 2
    assert grid.difference(["b"], ["a", "c"]) == f"{mean:+.2f} ± {half:.2f} (2 seeds)"
    alone = tables.Grid([*rows[:1], *rows[3:4]], lambda r: r["cell"])
    assert alone.difference(["b"], ["a"]) == "+1.00 (1 seed)"
    apart = tables.Grid([rows[0], rows[4]], lambda r: r["cell"])
    assert apart.difference(["b"], ["a"]) == "no seed in common"


def test_guidance_and_steps_are_compared_over_the_other_axis() -> None:
    """Accuracy 80 - guidance + steps / 10, and half a point by seed where guidance is 4."""
    stamp = {"device": "CPU", "date": "2026-01-01"}
    rows = [
        {
            "part": "grid",
            "guidance_scale": s,
            "num_steps": k,
            "seed": seed,
            "images": 1,
            "views": 1,
            "top1": (80 - s + k / 10 + 0.5 * seed * (s == 4)) / 100,
            "environment": stamp,
        }
        for s in (1.0, 2.0, 4.0)
        for k in (4, 50)
        for seed in (1, 2)
    ]
    text = generator_tables.finding_2(rows)
    # Gaps of seeds 1 and 2: 2 - 0.5 and 2 - 1; 3 - 0.5 and 3 - 1; twice 4.6.
    half = 12.706 * 0.5 / 2
    assert f"guidance 2 less 4: +1.25 ± {half:.2f} (2 seeds)" in text
    assert f"guidance 1 less 4: +2.25 ± {half:.2f} (2 seeds)" in text
    assert "50 steps less 4: +4.60 ± 0.00 (2 seeds)" in text


def test_a_ring_that_held_a_block_more_is_shown_with_it() -> None:
    stamp = {"device": "CPU", "date": "2026-01-01"}
    old = {
        "how": "ring",
        "held_images": 1024,
        "images": 4096,
        "views": 8192,
        "seed": 0,
        "top1": 0.8,
        "superseded": "ring of N + 512",
        "environment": stamp,
    }
    new = {**old, "how": "frozen", "held_images": 4096, "top1": 0.9}
    del new["superseded"]
    text = tables.reuse([old, new])
    assert "| ring, 4,096 pass | 1,536 | 1.1 | 2 | 80.00 | -10.00 (1 seed) |" in text
    assert "| frozen set | 4,096 | 3.1 | 2 | 90.00 |  |" in text


def test_tables_render_with_whatever_rows_exist() -> None:
    stamp = {"device": "CPU", "date": "2026-01-01"}
    one = {"arm": "real", "top1": 0.9, "agreement": 0.95, "views": 100, "environment": stamp}
    assert "| real training images | 90.00 |  | 1 | 95.00 |" in tables.finding_1([one])
    cell = {
        "part": "grid",
        "guidance_scale": 1.0,
        "num_steps": 4,
        "seed": 0,
        "top1": 0.8,
        "images": 10,
        "views": 100,
        "cpu_s": 3600.0,
        "environment": stamp,
    }
    text = generator_tables.finding_2([cell])
    assert "| 1 | 80.00 |" in text and "1.00 CPU hours" in text


def test_an_ancestral_solver_is_shown_beside_the_grid_with_its_own_difference() -> None:
    """Steps cost the grid's solver (0.5 + seed) points, and the ancestral one twice as much."""
    stamp = {"device": "CPU", "date": "2026-01-01"}
    rows = [
        {
            "part": part,
            "guidance_scale": 2.0,
            "num_steps": steps,
            "seed": seed,
            "top1": 0.8 + (steps == 50) * factor * (0.005 + 0.01 * seed),
            "environment": stamp,
        }
        for part, factor in (("grid", 1), ("ancestral", 2))
        for steps in (4, 50)
        for seed in (0, 1)
    ]
    quality = {"frechet": 0.25, "precision": 0.5, "recall": 0.75}
    rows.append({**rows[-1], "seed": "quality", **quality})
    text = generator_tables.finding_2_ancestral(rows)
    half = 12.706 * 0.5
    assert f"dpm++2m (deterministic): 50 steps less 4: +1.00 ± {half:.2f} (2 seeds)" in text
    assert f"ddpm (ancestral): 50 steps less 4: +2.00 ± {2 * half:.2f} (2 seeds)" in text
    assert "| 0.250 | 0.500 | 0.750 |" in text and "| dpm++2m (deterministic) | 4 | 80.00" in text


def test_teachers_are_compared_over_all_temperatures() -> None:
    stamp = {"device": "CPU", "date": "2026-01-01"}
    rows = [
        {
            "student": "s",
            "teacher": t,
            "temperature": k,
            "seed": seed,
            "top1": (m + seed) / 100,
            "views": 10,
            "environment": stamp,
        }
        for t, m in (("weak", 80), ("strong", 70))
        for k in (1.0, 4.0)
        for seed in (0, 1)
    ]
    rows[-1]["top1"] += 0.04  # strong, T = 4, seed 1: by seed the gaps are 10 and 8
    text = tables.finding_3(rows)
    assert f"weak less strong teacher +9.00 ± {12.706:.2f} (2 seeds) [T = 1: +10.00" in text
    assert f"T = 4: +8.00 ± {2 * 12.706:.2f} (2 seeds)]." in text
    # A cell that started as its teacher is left out, and what it would change is said.
    rows[0]["superseded"] = "starts as the teacher"
    text = tables.finding_3(rows)
    assert "weak less strong teacher +8.00 (1 seed) [T = 1: +" in text
    assert "], including the cells left out: +9.00" in text


def test_stored_teachers_are_compared_with_a_live_one_by_seed() -> None:
    stamp = {"environment": {"device": "CPU", "date": "2026-01-01"}, "images": 512}
    sets = [
        {"arm": arm, "seed": "set", "cpu_s": cpu_s, "bytes": size, **stamp}
        for arm, cpu_s, size in (("live", 10.0, 0), ("full", 12.0, 512 * 168))
    ]
    rows = [
        {"arm": arm, "seed": seed, "top1": top1, "cpu_s": 60.0, "views": 2048, **stamp}
        for arm, values in (("live", (0.9, 0.8)), ("full", (0.89, 0.8)))
        for seed, top1 in enumerate(values)
    ]
    text = tables.stored_teacher([*sets, *rows])
    assert "| -0.50 ± 6.35 (2 seeds) | 60.0 | 12.0 | 168.0 |" in text
    assert "| live | 85.00 ± " in text and "2,048 views a student" in text


def test_a_line_is_found_and_a_bend_is_told() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    intercept, slope, worst = tables.line(xs, [3 + 2 * x for x in xs])
    assert (intercept, slope) == (pytest.approx(3.0), pytest.approx(2.0)) and worst < 1e-9
    assert tables.line(xs, [x**2 for x in xs])[2] > 0.2


def test_every_arm_is_compared_with_real_images_by_seed() -> None:
    stamp = {
        "agreement": 0.9,
        "views": 100,
        "images": 512,
        "environment": {"device": "CPU", "date": "2026-01-01"},
    }
    top1 = {"real": (0.90, 0.88), "diffusion": (0.89, 0.86), "other noise": (0.90, 0.86)}
    rows = [
        {"arm": arm, "seed": seed, "top1": value, **stamp}
        for arm, values in top1.items()
        for seed, value in enumerate(values)
    ]
    text = tables.finding_1(rows)
    assert "| diffusion images (512) | 87.50 | 2.12 | 2 | 90.00 | -1.50 ± 6.35 (2 seeds) |" in text
    assert "has not seen less noise that it has: +0.50 ± 6.35 (2 seeds)." in text
    assert set(tables.ARMS) == set(finding_1.ARMS)


def test_samples_of_images_are_what_the_interval_of_guidance_is_over() -> None:
    """Gaps of the noise seeds 1 and 2 are 3 and 5, whatever the students of a sample do."""
    stamp = {"environment": {"device": "CPU", "date": "2026-01-01"}, "images": 8, "views": 8}
    rows = [
        {
            "part": "samples",
            "student": "lenet5_half",
            "guidance_scale": scale,
            "num_steps": 16,
            "noise_seed": noise,
            "seed": seed,
            "top1": (80 - (1 + 2 * noise) * (scale == 4) + (-1) ** seed) / 100,
            **stamp,
        }
        for scale in (2.0, 4.0)
        for noise in (1, 2)
        for seed in (1, 2)
    ]
    text = generator_tables.finding_2_samples(rows)
    wanted = f"| 80.00 | 76.00 | +4.00 ± {12.706:.2f} (2 noise seeds) | +3.00 +5.00 |"
    assert f"| lenet5_half {wanted}" in text
    assert "2 samples of 8 images, 2 student seeds on each, 16 steps" in text


def test_speed_and_accuracy_of_a_loop_say_their_own_threads() -> None:
    stamp = {"device": "CPU", "date": "2026-01-01"}
    rows = [
        {"arm": arm, "seed": seed, "top1": 0.9, "views": 64}
        | {"environment": {**stamp, "threads": 1}}
        for arm in ("Distiller", "ordinary loop")
        for seed in (1, 2)
    ]
    speed = {"arm": "speed", "seed": "quality", "times_distiller": 1.0, "p20": 0.9, "p80": 1.1}
    rates = {"Distiller views/s": 10, "ordinary loop views/s": 11, "n": 3}
    rows.append(speed | rates | {"environment": {**stamp, "threads": 2}})
    text = generator_tables.loader(rows)
    assert "`--part speed --threads 2`" in text and "`--part accuracy --threads 1`" in text


def test_equal_compute_cells_are_compared_with_the_first_by_seed() -> None:
    stamp = {"environment": {"device": "CPU", "date": "2026-01-01"}, "images": 8, "views": 8}
    rows = [
        {
            "part": "compute",
            "guidance_scale": scale,
            "num_steps": steps,
            "seed": seed,
            "top1": (80 - scale + seed) / 100,
            **stamp,
        }
        for scale, steps in finding_2.EQUAL_COMPUTE
        for seed in (1, 2)
    ]
    text = generator_tables.finding_2_checks(rows)
    assert "guidance 1, 4 steps less guidance 1, 16 steps: +0.00 ± 0.00 (2 seeds)" in text
    assert "less guidance 4, 50 steps: +3.00 ± 0.00 (2 seeds)." in text
