"""Every rendered table is what its rows say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import harness, provenance, render

ROOT = Path(__file__).parents[2]


def test_tables_agree_with_the_recorded_rows() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert render.render(text) == text, f"{path.name}: run python -m benchmarks render"
    marked = re.findall(r"<!-- rows:([a-z0-9-]+) -->", (ROOT / "README.md").read_text())
    assert marked, "README shows no measured rows"
    for name in marked:
        assert render.rows_of(name)[0], f"no rows for {name}"


def test_shown_rows_were_made_with_the_defaults_of_their_command() -> None:
    """Every measurement's parser is called, and no row has a mark without a meaning."""
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    assert render.check(match[2] for text in texts for match in render.MARKED.finditer(text)) == []


def test_check_refuses_rows_of_other_arguments_and_unknown_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = harness.RESULTS
    shutil.copytree(real, tmp_path / "results")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    lines = (real / "fidelity.jsonl").read_text().splitlines()
    for change, message in (
        ({"arguments": {"seeds": 1, "views": 1}}, "fidelity: arguments of rows: got"),
        ({"superseded": "tired"}, "fidelity.jsonl:4: superseded: got 'tired', expected one of"),
    ):
        changed = json.dumps({**json.loads(lines[-1]), **change})
        (tmp_path / "results" / "fidelity.jsonl").write_text("\n".join([*lines[:-1], changed]))
        assert render.main(["--check"]) == 1
        assert message in capsys.readouterr().err
    # A row that is known to be superseded may have any arguments.
    row = json.loads(lines[0]) | {"superseded": "one seed", "arguments": {}}
    assert provenance.other_arguments("fidelity", [row]) == []


def test_a_changed_figure_is_noticed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = render.MARKED.search(text)
    assert block
    digit = re.search(r"0\.\d+", block[0])
    assert digit
    wrong = text.replace(digit[0], "0.12345", 1)
    assert render.render(wrong) == text != wrong
