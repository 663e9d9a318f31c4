"""Fixtures of the tests of whole jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from generate_farm import make_set


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images made by one job without a break."""
    folder = tmp_path_factory.mktemp("generate") / "whole"
    summary = make_set(folder)
    assert summary["made_images"] == summary["images"] == 200 and summary["is_complete"]
    return folder
