"""Fixtures and options that all tests share, and a table of claims at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import build_distiller

from dmkd_fast import Distiller
from dmkd_fast.runtime.device import exact_float32

pytest_plugins = ["real_sets"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this suite.

    `--few` runs the tests marked `hard` with their smaller number of cases. `--without` makes
    installed packages look as if they were missing, as after `make setup EXTRAS=slim`.
    """
    parser.addoption("--few", action="store_true", help="fewer cases for tests marked hard")
    parser.addoption("--without", default="", help="packages to hide: nvidia.dali,xformers")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the packages named by `--without` from imports."""
    for name in filter(None, config.getoption("--without").split(",")):
        assert name not in sys.modules, f"{name} was imported before it could be hidden"
        sys.modules[name] = None  # type: ignore[assignment]


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which packages are hidden."""
    hidden = config.getoption("--without")
    return f"hidden packages: {hidden}" if hidden else None


@pytest.fixture
def num_cases(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Choose the number of cases of a test marked `hard`, by `num_cases(all, few)`."""
    few = request.config.getoption("--few")
    return lambda all_cases, few_cases: few_cases if few else all_cases


@pytest.fixture(autouse=True, scope="session")
def cache_is_empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the package caches in a folder of the session; the Hub's cache stays in place."""
    hub = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", os.environ.get("HF_HOME") or str(hub))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def float32_is_exact() -> Iterator[None]:
    """Switch off TF32, since tests compare numbers."""
    with exact_float32():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` on machines without a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def make_distiller(tmp_path: Path) -> Callable[..., Distiller]:
    """Build equal distillers, each with its own run directory unless one is given."""
    count = 0

    def make(*, run_dir: Path | None = None, **changes: Any) -> Distiller:
        nonlocal count
        count += 1
        return build_distiller(run_dir or tmp_path / f"run{count}", **changes)

    return make


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failed test at once, since a run that is cut short prints no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}", flush=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the claims tested by many cases, recorded with `record_property("cases", n)`."""
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            facts = dict(getattr(report, "user_properties", ()))
            if "claim" in facts and report.when == "call":
                failures = facts.get("failures", int(outcome == "failed"))
                rows.append((facts["claim"], facts["cases"], failures))
    if rows:
        terminalreporter.section("claims")
        terminalreporter.write_line(f"{'cases':>6} {'failures':>9}  claim")
        for claim in dict.fromkeys(claim for claim, *_ in rows):
            cases = sum(n for name, n, _ in rows if name == claim)
            failures = sum(n for name, _, n in rows if name == claim)
            terminalreporter.write_line(f"{cases:>6} {failures:>9}  {claim}")
