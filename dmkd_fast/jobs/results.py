"""Write the results of a finished distillation into its run directory.

Each file and folder gets its name only once it is complete on disk. An interrupted job therefore
leaves only complete files, and a resumed job writes them again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmkd_fast.classifiers.loading import save_classifier, timm_lines
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.jobs import run_dir
from dmkd_fast.jobs.evaluate import STUDENT, evaluate_run
from dmkd_fast.jobs.images import attention_facts, card_sentence, row_names
from dmkd_fast.jobs.report import images as report_images
from dmkd_fast.jobs.report.live import LivePage
from dmkd_fast.jobs.report.scores import evaluation_facts
from dmkd_fast.runtime import files
from dmkd_fast.training.distiller import Distiller

if TYPE_CHECKING:
    from dmkd_fast.jobs.parts import Parts

SUMMARY = run_dir.SUMMARY


def write(
    distiller: Distiller, config: DistillConfig, parts: Parts, page: LivePage
) -> dict[str, Any]:
    """Write student, samples, summary, model card and page; return the summary.

    Raises:
        UserError: A file cannot be written. The last checkpoint holds the trained student.
    """
    folder = Path(config.run_dir)
    resume = f"run: {run_dir.resume_command(folder, distiller.ranks)}"
    with run_dir.writing_results(folder / STUDENT, resume):
        with files.new_folder(folder / STUDENT) as partial:
            spec = replace(parts.student_spec, label_names=parts.test_set.class_names)
            save_classifier(distiller.student.average.module, spec, partial)
        with distiller.clock.part("evaluate"):
            found = evaluate_run(folder, display=distiller.display)
        scores = found.scores
        _draw_samples(
            distiller, row_names(parts.origin, parts.test_set.class_names), folder / "samples.png"
        )
        summary = {
            **{name: scores[name] for name in ("top1", "top5", "teacher_top1", "agreement")},
            **distiller.totals(),
            **attention_facts(parts.origin, distiller.device, config.dtype),
            "denoiser_license": parts.origin.license,
            "teacher_license": parts.teachers.license,
            **what_is_lost(config),
            "run_dir": str(folder),
        }
        _write_card(folder, config, parts, summary)
        files.replace(folder / SUMMARY, [json.dumps(summary, indent=2).encode() + b"\n"])
        page.facts["evaluation"] = evaluation_facts(found, parts.test_set)
        page.write("finished", summary=summary)
        files.sync(folder)
    return summary


def what_is_lost(config: DistillConfig) -> dict[str, str]:
    """Return the line of the summary that says that a run cannot be repeated, if so."""
    if config.device != "cuda" or config.repeatable:
        return {}
    reason = "kernels were chosen by timing, so a resumed or repeated run ends with other weights"
    return {"repeatable": f"no: {reason}"}


def _draw_samples(distiller: Distiller, names: tuple[str, ...], path: Path) -> None:
    """Draw ten images of the ring for each class, of at most 100 classes."""
    ring = distiller.ring
    classes = report_images.evenly(len(names), report_images.MOST_ROWS)
    indices = report_images.by_class(ring.labels[: ring.num_filled], classes, 10)
    rows = report_images.cells(ring.images, indices)
    report_images.grid(rows, [names[label] for label in classes], path)


def _write_card(folder: Path, config: DistillConfig, parts: Parts, summary: dict[str, Any]) -> None:
    """Write the model card, README.md, beside the student's weights."""
    spec = parts.student_spec
    teachers = ", ".join(f"`{t.path or t.arch}`" for t in config.teachers.values())
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary.items())
    text = (
        f"---\nlibrary_name: dmkd_fast\ntags: [knowledge-distillation, synthetic-data]\n---\n"
        f"# {spec.architecture} distilled from generated images\n\n"
        f"Teacher {teachers}, images from {card_sentence(config)} "
        "Accuracies are fractions of the real test set, which decided nothing.\n\n"
        f"| figure | value |\n|---|---|\n{rows}\n\n"
        "```python\nfrom dmkd_fast import load_classifier\n\n"
        'model, spec = load_classifier(".")\n```\n'
        f"{timm_lines(spec)}"
        f"Inputs: {spec.in_chans} x {spec.input_size} x {spec.input_size}, pixels in [0, 1] "
        f"normalized with mean {list(spec.mean)} and std {list(spec.std)}.\n"
    )
    files.replace(folder / STUDENT / "README.md", [text.encode()])
