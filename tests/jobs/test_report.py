"""Pages about runs: of finished, running, interrupted and killed ones; lists and comparisons."""

from __future__ import annotations

import json
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from report_runs import many_class_facts, write_run
from small_jobs import CONFIG, SHORT, build_distiller
from torch import Tensor

from dmkd_fast import UserError, cli
from dmkd_fast.jobs.report import data as report_data
from dmkd_fast.jobs.report import images as report_images
from dmkd_fast.jobs.report import live as report_live
from dmkd_fast.jobs.report import runs as report
from dmkd_fast.jobs.report.html import duration
from dmkd_fast.jobs.report.live import LivePage
from dmkd_fast.jobs.report.scores import calibration, confusion
from dmkd_fast.runtime import files
from dmkd_fast.training.distiller import Distiller

SECTIONS = (
    "Accuracy and loss",
    "Training images",
    "Real test images",
    "Classes",
    "Calibration",
    "Ring of images",
    "Where the time went",
    "Cost",
    "Commands",
    "Licenses and versions",
    "Settings",
)
REFRESH = 'http-equiv="refresh"'


class Outline(HTMLParser):
    """Collect what a page contains."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.points: list[int] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[name] or "" for name in ("src", "href") if name in values]
        if tag == "polyline":
            self.points.append(len((values["points"] or "").split()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run a tiny job whose page is written at every row; return its folder and all pages."""
    run, pages = tmp_path_factory.mktemp("report") / "run", []
    write = LivePage.write

    def recorded(page: LivePage, *arguments: Any, **named: Any) -> None:
        write(page, *arguments, **named)
        pages.append((run / "report.html").read_text(encoding="utf-8"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LivePage, "write", recorded)
        patch.setattr(report_live, "EVERY_S", 0.0)
        patch.setattr(report_live, "_LEAST_RATIO", 0.0)
        assert cli.main(["distill", CONFIG, *SHORT, f"run_dir={run}"]) == 0
    return run, pages


def test_page_of_a_finished_run_has_every_section(finished: tuple[Path, list[str]]) -> None:
    run, pages = finished
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page == pages[-1] and REFRESH not in page and "<b>Finished</b>" in page
    for title in SECTIONS:
        assert f"<h2>{title}</h2>" in page, title
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for name in ("top1", "top5", "teacher_top1", "agreement"):
        assert f"{100 * summary[name]:.2f}\u00a0%" in page, name
    outline = Outline(page)
    rows = (run / "stats.jsonl").read_text(encoding="utf-8").splitlines()
    assert outline.points.count(len(rows)) >= 3  # the loss against seconds, views and images
    assert all(link.startswith("data:") for link in outline.links) and "script" not in outline.tags
    assert outline.tags.count("img") >= 20 and len(page) < 500_000
    assert f"dmkd distill {run}/config.yaml run_dir={run}-again" in page


def test_page_lives_while_the_run_goes_on(finished: tuple[Path, list[str]]) -> None:
    _, pages = finished
    running = pages[:-1]
    assert len(running) >= 4 and all(REFRESH in page for page in running)
    assert "the first images are being made" in running[0]
    assert "Training images" not in running[0] and "Training images" in running[1]
    loss = [max(Outline(page).points, default=0) for page in running]
    assert loss == sorted(loss) and loss[-1] > loss[1] > 0


def test_seconds_by_part_add_up_to_the_time_of_the_run(finished: tuple[Path, list[str]]) -> None:
    spent = report_data.load(finished[0]).times()
    assert {"warm_up", "generate", "views", "teacher", "student", "evaluate", "save"} <= set(spent)
    summary = json.loads((finished[0] / "summary.json").read_text(encoding="utf-8"))
    assert sum(spent.values()) == pytest.approx(summary["wall_s"], abs=0.5)
    assert all(seconds >= 0 for seconds in spent.values()) and spent["student"] > 0


def test_page_of_a_killed_run_says_so_and_how_to_go_on(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "killed run"
    shutil.copytree(finished[0], run)
    (run / "summary.json").unlink()
    facts = json.loads((run / "report.json").read_text(encoding="utf-8"))
    (run / "report.json").write_text(json.dumps(facts | {"state": "running"}), encoding="utf-8")
    (run / "report.html").write_text(finished[1][1], encoding="utf-8")
    with files.locked(run / ".lock"):
        assert report_data.load(run).state == "running"
        report.report([run])
        assert (run / "report.html").read_text(encoding="utf-8") == finished[1][1]
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"report": f"{run}/report.html", "run_dir": str(run)}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Killed or lost" in page and REFRESH not in page
    assert f"dmkd distill &#x27;{run}/config.yaml&#x27; --resume" in page


def test_page_of_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, run = Distiller.train_step, tmp_path / "run"

    def interrupted(distiller: Distiller) -> Tensor:
        if distiller.step == 7:
            raise KeyboardInterrupt
        return step(distiller)

    monkeypatch.setattr(Distiller, "train_step", interrupted)
    assert cli.main(["distill", CONFIG, *SHORT, f"run_dir={run}"]) == 130
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<b>Interrupted</b>" in page and REFRESH not in page
    assert f"dmkd distill {run}/config.yaml --resume" in page
    assert report_data.load(run).state == "interrupted"


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    page = LivePage(write_run(tmp_path / "run"), {})
    monkeypatch.setattr(files, "replace_unsynced", full)
    page.write("running")
    assert "report.html: not written" in caplog.text and not (page.folder / "report.html").exists()


def test_page_of_a_thousand_classes_is_small(tmp_path: Path) -> None:
    facts = many_class_facts(1000)
    run = write_run(tmp_path / "run", num_rows=5000, facts=facts, summary={"top1": 0.5})
    report.report([run])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 500_000
    assert "The 20 worst of 1,000 classes" in page and "The 20 best" in page
    assert "20 of 1,000 classes" in page and "Most frequent mistakes" in page
    assert f"{report_data.MOST_POINTS} of 5,000 points" in page
    found = report.report([run])
    assert len(found["classes"]) == 1000 and "samples" not in found


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script><b class="x">&amp;\''
    run = write_run(tmp_path / "a<i>&b", facts=many_class_facts(3, side=8, name=evil))
    report.report([run])
    page = (run / "report.html").read_text(encoding="utf-8")
    tags = set(Outline(page).tags)
    assert "script" not in tags and evil not in page
    assert "&lt;script&gt;" in page and "a&lt;i&gt;&amp;b" in page
    report.report([run, write_run(tmp_path / "other")], tmp_path / "both.html")
    both = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "script" not in Outline(both).tags and "a&lt;i&gt;&amp;b" in both


def test_a_row_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_rows=3)
    with (run / "stats.jsonl").open("a", encoding="utf-8") as stats:
        stats.write('{"views": 99')
    found = report_data.load(run)
    assert found.num_rows == len(found.rows) == 3 and found.state == "killed"


def test_rows_after_the_last_checkpoint_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    page = LivePage(write_run(tmp_path / "run", num_rows=10), {})
    page.add({"views": 640 * 4, "wall_s": 7.0, "loss": 9.0})
    assert [row["views"] for row in page.rows] == [640, 1280, 1920, 2560]
    assert page.num_rows == 4 and page.rows[-1]["loss"] == 9.0


def test_several_runs_are_compared_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path / "first", facts=many_class_facts(3, side=8), summary={"top1": 0.9})
    second = write_run(tmp_path / "second", seed=5, num_rows=10)
    assert cli.main(["report", "--json", str(first), str(second)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"seed": [0, 5]}
    assert [run["top1"] for run in found["runs"]] == [0.9, 1 - 1 / 11]
    assert [run["state"] for run in found["runs"]] == ["finished", "killed"]
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    outline = Outline(page)
    assert sorted(outline.points) == [2] * 3 + [4] * 3 + [10] * 3 + [20] * 3
    assert {"first/report.html", "second/report.html"} <= set(outline.links)


def test_runs_are_listed_with_the_settings_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 0
    assert "no runs in runs/" in capsys.readouterr().out
    for seed in (0, 0, 3):
        write_run(tmp_path / "runs" / f"run-{len(list(tmp_path.glob('runs/*')))}", seed=seed)
    (tmp_path / "runs" / "run-0" / "summary.json").write_text('{"top1": 0.75, "wall_s": 61}')
    assert cli.main(["report"]) == 0
    out = capsys.readouterr().out
    assert "run-0" in out and "0.7500" in out and "finished" in out and out.count("seed=3") == 1
    assert cli.main(["report", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert sorted(run["differs"] for run in listed) == ["", "", "seed=3"]


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_damaged_files_are_one_line(content: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"summary\.json"):
        report.report([run])
    (run / "summary.json").unlink()
    (run / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yaml"):
        report.report([run])


def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path / "nope")]) == 2
    assert "no such directory, expected the directory of a run" in capsys.readouterr().err
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot write the page (No such file or directory)" in capsys.readouterr().err


def test_classes_without_images_in_the_ring_are_not_shown(tmp_path: Path) -> None:
    distiller = build_distiller(tmp_path / "run")
    distiller.refill()
    names = tuple(str(i) for i in range(4))
    shown = report_live.ring_facts(distiller, names)["samples"]
    assert [row["class"] for row in shown] == list(names)
    distiller.ring.labels.fill_(3)
    shown = report_live.ring_facts(distiller, names)["samples"]
    assert [row["class"] for row in shown] == ["3"]
    assert report_live.ring_facts(distiller, names[:3])["samples"] == []


def test_confusion_and_calibration_count_every_image() -> None:
    labels, guesses = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    assert confusion(labels, guesses, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    bins = calibration(torch.tensor([0.1, 0.95, 1.0, 0.97]), guesses == labels)
    assert len(bins) == 15 and sum(count for count, _, _ in bins) == 4
    assert bins[1] == (1, pytest.approx(0.1), 1.0)
    assert bins[14] == (3, pytest.approx((0.95 + 1.0 + 0.97) / 3), pytest.approx(1 / 3))


@pytest.mark.parametrize("num_classes", [1, 3, 1000])
def test_samples_are_drawn_for_any_number_of_classes(num_classes: int, tmp_path: Path) -> None:
    from PIL import Image

    images = torch.randint(256, (300, 3, 96, 80), dtype=torch.uint8)
    labels = torch.arange(300) % num_classes
    classes = report_images.evenly(num_classes, report_images.MOST_ROWS)
    rows = report_images.cells(images, report_images.by_class(labels, classes, 10))
    assert rows.shape == (min(num_classes, 100), 10, 3, 64, 53)
    report_images.grid(rows, [f"class {i} \u2603" for i in classes], tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height == 64 * len(classes) and picture.width < 800


@pytest.mark.parametrize(("side", "channels", "classes"), [(28, 1, 10), (256, 3, 20)])
def test_a_page_costs_little_while_the_run_goes_on(
    side: int, channels: int, classes: int, tmp_path: Path
) -> None:
    """The aim is 20 ms on an idle core; a busy machine gets ten times that."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(256, channels, side // 4, side // 4, generator=generator)
    images = torch.nn.functional.interpolate(small, (side, side), mode="bilinear")
    ring = SimpleNamespace(
        num_filled=256,
        capacity=256,
        labels=torch.arange(256) % classes,
        images=(255 * images).byte(),
    )
    distiller: Any = SimpleNamespace(ring=ring, ring_statistics=None)
    names = tuple(f"class {i}" for i in range(classes))
    run = write_run(tmp_path / "run", num_rows=2 * report_data.MOST_POINTS)
    page = LivePage(run, {}, look=lambda: report_live.ring_facts(distiller, names))
    spent = []
    for _ in range(5):
        started = time.thread_time()
        page.write("running")
        spent.append(time.thread_time() - started)
    assert len(page.facts["samples"]) == classes
    assert min(spent) < 0.2


def test_texts_that_are_no_unicode_are_written_with_question_marks(tmp_path: Path) -> None:
    page = LivePage(write_run(tmp_path / "run"), {"title": "caf\udce9"})
    page.write("running")
    assert "<p>caf?</p>" in (page.folder / "report.html").read_text(encoding="utf-8")
    run = write_run(tmp_path / "caf\udce9")
    report.report([run])
    assert f"{tmp_path}/caf?</p>" in (run / "report.html").read_text(encoding="utf-8")


def test_a_comparison_links_to_runs_of_any_name(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a#b?c%d e", "other")]
    report.report(runs, tmp_path / "both.html")
    links = Outline((tmp_path / "both.html").read_text(encoding="utf-8")).links
    assert {"a%23b%3Fc%25d%20e/report.html", "other/report.html"} <= set(links)


def test_only_runs_with_a_class_in_common_are_compared_by_class(tmp_path: Path) -> None:
    first, second, other = (
        write_run(tmp_path / str(i), facts=many_class_facts(3, side=8, name=name))
        for i, name in enumerate(("cat", "cat", "dog"))
    )
    for runs, is_shown in (([first, second], True), ([first, other], False)):
        report.report(runs, tmp_path / "both.html")
        page = (tmp_path / "both.html").read_text(encoding="utf-8")
        assert ("<h2>Classes</h2>" in page) == is_shown


def test_seconds_are_rounded_before_they_are_split() -> None:
    assert duration(119.7) == "2 min 00 s" and duration(7199.7) == "2 h 00 min"
