"""The choice between a Triton kernel and the eager definition, and what is logged about it."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dmkd_fast.runtime import errors, native, operators
from dmkd_fast.runtime.errors import warn_once


@pytest.fixture(autouse=True)
def _nothing_is_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


def twice(values: Tensor) -> Tensor:
    return 2 * values


def test_the_kernel_runs_but_float64_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(twice=lambda values: values + 1)
    monkeypatch.setitem(sys.modules, "dmkd_fast.some.triton", kernels)
    monkeypatch.setattr(operators, "_why_no_launch", lambda: "")
    run = operators.cuda_kernel("dmkd_fast.some.triton", "twice", twice)
    assert run(torch.tensor(5.0)) == 6
    assert run(torch.tensor(5.0, dtype=torch.float64)) == 10


def test_without_triton_the_definition_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "dmkd_fast.some.triton", None)
    run = operators.cuda_kernel("dmkd_fast.some.triton", "twice", twice)
    assert run(torch.tensor(5.0)) == run(torch.tensor(5.0)) == 10
    (record,) = caplog.records
    assert record.name == "dmkd_fast" and "so some operators run" in record.getMessage()


def test_where_triton_cannot_build_its_launcher_the_definition_runs_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Driver:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("triton.runtime"), "driver", Driver())
    monkeypatch.setattr(operators, "_why_no_launch", operators._why_no_launch.__wrapped__)
    monkeypatch.setitem(sys.modules, "dmkd_fast.some.triton", SimpleNamespace())
    run = operators.cuda_kernel("dmkd_fast.some.triton", "twice", twice)
    assert run(torch.tensor(5.0)) == run(torch.tensor(5.0)) == 10
    (record,) = caplog.records
    assert "(Failed to find C compiler. Please specify it.), so some" in record.getMessage()


def test_without_the_extension_a_cpu_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    operators.warn_if_eager(torch.ones(1))
    assert not caplog.records
    monkeypatch.setattr(native, "INSTRUCTION_SET", "none")
    operators.warn_if_eager(torch.ones(1, device="meta"))
    assert not caplog.records
    operators.warn_if_eager(torch.ones(1))
    operators.warn_if_eager(torch.ones(1))
    (record,) = caplog.records
    assert "no compiled CPU kernels" in record.getMessage()


def test_only_rank_0_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    warn_once("a 100% slow path")
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    warn_once("a 100% slow path")
    assert caplog.messages == ["a 100% slow path"]
