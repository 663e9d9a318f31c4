"""What one process knows of the others, without starting any."""

from __future__ import annotations

import os

import pytest
from torch import Tensor

from dmkd_fast.runtime import distributed


def test_a_process_without_a_parent_belongs_to_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert distributed.read().launch
    monkeypatch.setattr(os, "getppid", lambda: 0)  # as the first process of a container
    assert distributed.read().launch == ""


def test_ranks_exchange_paths_that_are_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(found: list[Tensor], mine: Tensor, *, group: object) -> None:
        for each in found:
            each.copy_(mine)

    monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
    ranks = distributed.Ranks(world_size=2, control=object())  # type: ignore[arg-type]
    assert ranks.gather("caf\udce9") == ["caf\udce9"] * 2
