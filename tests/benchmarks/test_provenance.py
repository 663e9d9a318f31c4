"""Tables name the command of their rows, and superseded rows give way to new ones."""

from __future__ import annotations

from benchmarks import provenance


def test_superseded_rows_give_way_to_as_many_as_an_interval_needs() -> None:
    old = {"cell": 1, "superseded": "one seed"}
    new, wrong = {"cell": 1}, {"cell": 1, "superseded": "starts as the teacher"}
    cell = lambda row: row["cell"]  # noqa: E731
    assert provenance.counted([old, new, new], cell) == [old, new, new]
    assert provenance.counted([old, new, new, new], cell) == [new, new, new]
    # What misleads gives way at once, and is shown where it is all there is.
    assert provenance.counted([wrong, new], cell) == [new]
    assert provenance.counted([wrong, {"cell": 2}], cell) == [wrong, {"cell": 2}]
    assert provenance.awaited([wrong, new], cell) == [wrong]
    assert provenance.awaited([wrong, new, new, new], cell) == []
    # Figures of a cell that no mean is taken over: one row replaces one.
    timing = {"cell": 1, "seed": "quality", "superseded": "beside other work"}
    again = {"cell": 1, "seed": "quality"}
    assert provenance.counted([timing, again], cell) == [again]
    assert provenance.awaited([timing, again], cell) == []
    network = {"cell": 1, "part": "teacher", "superseded": "Muon teacher"}
    assert provenance.awaited([network, {"cell": 1, "part": "teacher"}], cell) == []
    assert "initial weights of the weak teacher" in provenance.remarks([wrong])


def test_a_table_says_the_command_that_made_its_rows() -> None:
    row = {
        "environment": {"commit": "abc"},
        "arguments": {
            "model": None,
            "tiny": False,
            "num_points": 3,
            "arms": ["a, b"],
            "overrides": ["seed=1"],
        },
    }
    assert provenance.made_by("thing", [row, row], ("--data", "DIR")) == (
        "Made by `python -m benchmarks thing --data DIR --num-points 3 --arms 'a, b' seed=1` "
        "at abc."
    )
