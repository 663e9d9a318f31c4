"""Write the page of a run while the run goes on."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmkd_fast import __version__
from dmkd_fast.jobs.images import row_names
from dmkd_fast.jobs.report import checks
from dmkd_fast.jobs.report import data as report_data
from dmkd_fast.jobs.report import page as report_page
from dmkd_fast.jobs.report.images import by_class, cells, evenly, sheet_uris
from dmkd_fast.runtime import files
from dmkd_fast.runtime.clock import Clock
from dmkd_fast.runtime.errors import UserError, shortened, warn_once

if TYPE_CHECKING:
    from dmkd_fast.jobs.parts import Parts
    from dmkd_fast.jobs.resolve import ResolvedJob
    from dmkd_fast.training.distiller import Distiller

EVERY_S = 3.0
"""Least number of seconds from one page to the next."""
_LEAST_RATIO = 50  # writing takes at most 1/50 of the time
_SHOWN_CLASSES, _PER_CLASS, _SAMPLE_BYTES = 20, 10, 150_000


class LivePage:
    """Keep `report.html` and `report.json` of a run up to date; they never stop the run.

    Args:
        folder: Run directory, which holds the config.
        facts: What the page says and the files of the run do not.
        clock: Clock of the run.
        look: Function that returns further facts that change while the run goes on.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        clock: Clock | None = None,
        look: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.folder, self.facts, self._clock, self._look = folder, facts, clock, look
        self._config: tuple[str, dict[str, Any]] | None = None
        self._next = 0.0
        try:
            self.rows, self.num_rows = report_data.read_rows(folder / report_data.STATS)
        except UserError as error:  # Lost rows do not justify the end of the run.
            warn_once(f"{folder / report_data.PAGE}: without earlier rows ({error})")
            self.rows, self.num_rows = [], 0

    def add(self, row: dict[str, Any]) -> None:
        """Take a row of statistics, and write the page if it is due."""
        while self.rows and self.rows[-1]["views"] >= row["views"]:
            self.rows.pop()  # rows that a killed run wrote after its last checkpoint
            self.num_rows -= 1
        report_data.add_row(self.rows, row)
        self.num_rows += 1
        if time.monotonic() >= self._next:
            self.write("running")

    def write(
        self, state: str, *, summary: dict[str, Any] | None = None, message: str = ""
    ) -> None:
        """Write both files.

        Args:
            state: State of the run, a key of `report_data.STATES`.
            summary: Summary of a finished run.
            message: Why the run failed.
        """
        started = time.monotonic()
        try:
            self.facts |= self._look()
            if self._clock is not None:
                parts = {name: round(s, 2) for name, s in self._clock.parts.items()}
                self.facts["seconds"] = {**parts, "whole": round(self._clock.wall_s(), 2)}
                self.facts["cpu_s"] = round(self._clock.cpu_s(), 1)
            self.facts |= {"state": state, "message": message, "written": _now()}
            text = json.dumps(self.facts, default=str, ensure_ascii=False)
            data = text.encode(errors="replace")  # a name of a file may be no Unicode
            # The run does not change its config, and YAML is slow to parse.
            self._config = self._config or checks.read_config(self.folder / report_data.CONFIG)
            run = report_data.RunData(
                folder=self.folder,
                state=state,
                facts=self.facts,
                rows=report_data.thinned(self.rows),
                num_rows=self.num_rows,
                config_text=self._config[0],
                config=self._config[1],
                summary=summary or {},
            )
            page = report_page.render(run).encode(errors="replace")
            files.replace_unsynced(self.folder / report_data.FACTS, data)
            files.replace_unsynced(self.folder / report_data.PAGE, page)
        except (OSError, UserError) as error:  # A lost page does not justify the end of the run.
            warn_once(
                f"{self.folder / report_data.PAGE}: not written ({shortened(str(error), 300)})"
            )
        spent = time.monotonic() - started
        self._next = time.monotonic() + max(EVERY_S, _LEAST_RATIO * spent)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Write the page at the start and when the run ends early."""
        self.write("running")
        try:
            yield
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        except Exception as error:
            self.write("failed", message=_described(error))
            raise


def page_of(distiller: Distiller, job: ResolvedJob, parts: Parts) -> LivePage:
    """Return the page of a distillation; each row of its statistics may rewrite the page."""
    config = job.config
    names = parts.test_set.class_names
    rows = row_names(parts.origin, names)
    spec = parts.student_spec
    teachers = [section.path or section.arch or "" for section in config.teachers.values()]
    origin = config.denoiser.path if config.denoiser else config.source and config.source.path
    facts = {
        "command": "dmkd distill",
        "title": f"Student {spec.architecture}, teacher {', '.join(teachers)}, "
        f"images from {origin or 'a procedure'}.",
        "num_classes": len(names),
        "num_teachers": len(teachers),
        "world_size": job.ranks.world_size,
        "student_parameters": _parameters(parts.student),
        "teacher_parameters": _parameters(parts.teachers.together),
        "licenses": {"images' generator": parts.origin.license, "teacher": parts.teachers.license},
        "versions": _versions(distiller.device),
    }
    samplers: Any = getattr(distiller.images, "samplers", ())
    if samplers:
        facts["forwards_per_image"] = [(at, one.forwards_per_image) for at, one in samplers]
    folder = Path(config.run_dir)
    page = LivePage(folder, facts, distiller.clock, lambda: ring_facts(distiller, rows))
    distiller.on_row.append(page.add)
    return page


def ring_facts(distiller: Distiller, names: tuple[str, ...]) -> dict[str, Any]:
    """Return images of the ring by class, and how often they were used and how old they are.

    The row of statistics has just been read, so the device has nothing left to wait for.
    """
    ring = distiller.ring
    if not ring.num_filled:
        return {}
    classes = evenly(len(names), _SHOWN_CLASSES)
    indices = by_class(ring.labels[: ring.num_filled], classes, _PER_CLASS)
    shown = [row for row, first in enumerate(indices[:, 0].tolist()) if first >= 0]
    indices = indices[:, (indices >= 0).any(dim=0)][shown]
    pictures = []
    if shown:
        rows = cells(ring.images, indices, most_side=48)
        pictures = sheet_uris(rows, most_bytes=_SAMPLE_BYTES)
    samples = [
        {"class": names[classes[row]], **picture}
        for row, picture in zip(shown, pictures, strict=True)
    ]
    found: dict[str, Any] = {"slots": ring.capacity}
    if (statistics := distiller.ring_statistics) is not None:
        ages = statistics.ages[statistics.ages >= 0]
        found |= {"uses": statistics.uses.tolist(), "ages": torch.bincount(ages).tolist()}
    return {"samples": samples, "ring": found}


def pretraining_page(folder: Path, kind: str, device: torch.device, clock: Clock) -> LivePage:
    """Return the page of a pretraining job, which has curves, times and settings only."""
    facts = {
        "command": f"dmkd pretrain {kind}",
        "arguments": [] if kind == "fewstep" else ["--data", "DIR"],
        "title": f"Pretraining of a {kind}.",
        "versions": _versions(device),
    }
    return LivePage(folder, facts, clock)


def rewrite(folder: Path, error: Exception | None = None) -> None:
    """Write the page of a run again: its results are complete, or an error has ended it.

    Args:
        folder: Run directory, which is locked.
        error: Error that ended the run, of which only an existing page tells.
    """
    if error is not None and not (folder / report_data.FACTS).is_file():
        return
    state, message = ("finished", "") if error is None else ("failed", _described(error))
    with contextlib.suppress(UserError):  # A lost page neither fails a run nor hides its error.
        LivePage(folder, report_data.load(folder).facts).write(state, message=message)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {shortened(str(error), 300)}"


def _versions(device: torch.device) -> dict[str, str]:
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "dmkd_fast": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "device": f"{name}, {torch.get_num_threads()} CPU threads",
    }


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _now() -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}"
