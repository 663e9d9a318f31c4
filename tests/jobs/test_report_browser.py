"""Pages in a headless Chromium: images, curves, requests, console, width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from report_runs import many_class_facts, write_run

from dmkd_fast.jobs.report import runs as report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
IMAGES = "[...document.images].map(image => image.complete ? image.naturalWidth : 0)"
POINTS = "[...document.querySelectorAll('polyline')].map(line => line.points.numberOfItems)"
TEXT = "getComputedStyle(document.body).color"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a run of 1,000 classes, and the one that compares it with another."""
    folder = tmp_path_factory.mktemp("runs")
    evil = "<img src=http://127.0.0.1:9/x onerror=alert(1)>"
    facts = many_class_facts(1000, name=evil)
    run = write_run(folder / "run", facts=facts, summary={"top1": 0.5, "teacher_top1": 0.6})
    report.report([run])
    report.report([run, write_run(folder / "other", seed=3)], folder / "both.html")
    return run / "report.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_is_complete_and_asks_for_nothing(
    width: int, dark: bool, page: Path, tab: Browser
) -> None:
    tab.open(page, width=width, dark=dark)
    images = tab.evaluate(IMAGES)
    assert len(images) > 40 and min(images) > 0
    points = tab.evaluate(POINTS)
    assert points.count(20) >= 3 and points.count(4) >= 3  # rows with a loss; with an accuracy
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.scripts.length") == 0
    sent = [address for address in tab.requests() if not address.startswith("data:")]
    assert sent == [page.resolve().as_uri()]
    assert tab.complaints() == []
    light = tab.evaluate(TEXT) == "rgb(27, 31, 36)"
    assert light != dark


def test_comparison_is_complete_and_asks_for_nothing(page: Path, tab: Browser) -> None:
    both = page.parent.parent / "both.html"
    for width in (400, 1400):
        tab.open(both, width=width)
        assert tab.evaluate(POINTS).count(20) == 6
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        sent = [address for address in tab.requests() if not address.startswith("data:")]
        assert sent == [both.resolve().as_uri()] and tab.complaints() == []


def test_page_of_a_killed_run_says_so_and_how_to_go_on(tmp_path: Path, tab: Browser) -> None:
    run = write_run(tmp_path / "a run", num_rows=10)
    report.report([run])
    for width, dark in ((400, True), (1400, False)):
        tab.open(run / "report.html", width=width, dark=dark)
        words = tab.evaluate("document.querySelector('.state').innerText")
        assert words.startswith("Killed or lost at 6,400 of 64,000 views")
        assert f"dmkd distill '{run}/config.yaml' --resume" in words
        assert tab.evaluate("document.querySelector('.state').getBoundingClientRect().top") < 300
        assert tab.evaluate(POINTS) == [2] * 3 + [10] * 6  # accuracy; loss, ring
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.complaints() == []
