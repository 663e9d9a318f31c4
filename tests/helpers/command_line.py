"""What the command line prints about a mistake."""

from __future__ import annotations

import pytest


def one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dmkd: "), captured.err
    for word in words:
        assert word in lines[0], (word, lines[0])
