"""Stored logits of single images, read from files of one or of many row groups."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dmkd_fast.data import teacher_logits
from dmkd_fast.data.teacher_logits import LogitsFile, LogitsPlan, LogitsWriter

ROWS = 20


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize(
    ("limits", "groups"),
    [
        ({}, [20]),
        ({"_GROUP_BYTES": 1}, [1] * 20),
        ({"_GROUP_BYTES": 3.9}, [3] * 6 + [2]),
        ({"_MOST_ROWS": 5}, [5] * 4),
    ],
)
def test_each_image_has_its_logits_whatever_the_row_groups(
    limits: dict[str, float],
    groups: list[int],
    top_k: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`_GROUP_BYTES` is given in images here."""
    plan = LogitsPlan(views_per_image=2, top_k=top_k, temperature=4.0, views={})
    for name, limit in limits.items():
        images = plan.bytes_per_image(7) if name == "_GROUP_BYTES" else 1
        monkeypatch.setattr(teacher_logits, name, int(limit * images))
    arrays, rng = plan.arrays(7), np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {name: rng.integers(0, 99, shape).astype(dtype) for name, (dtype, shape) in arrays.items()}
        for _ in range(ROWS)
    ]
    path = tmp_path / "x.logits.parquet"
    writer = LogitsWriter(path, arrays)
    hashes = [
        writer.add(100 + i, {name: values.tobytes() for name, values in row.items()})
        for i, row in enumerate(rows)
    ]
    writer.close()
    facts = pq.read_metadata(path)
    assert [facts.row_group(i).num_rows for i in range(facts.num_row_groups)] == groups
    assert hashes[0] == hashlib.sha256(b"".join(v.tobytes() for v in rows[0].values())).hexdigest()
    file = LogitsFile(path, arrays, hashes)
    for i in random.Random(0).sample(range(ROWS), ROWS):
        found = file.read(i)
        assert found.keys() == rows[i].keys()
        for name, values in rows[i].items():
            assert found[name].dtype == values.dtype and np.array_equal(found[name], values)
