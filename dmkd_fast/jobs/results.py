"""Write the results of a finished distillation into its run directory.

Each file and folder gets its name only once it is complete on disk. An interrupted job therefore
leaves only complete files, and a resumed job writes them again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmkd_fast.classifiers.loading import save_classifier, timm_lines
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.jobs import report, run_dir
from dmkd_fast.jobs.evaluate import STUDENT, evaluate_run
from dmkd_fast.jobs.images import card_sentence
from dmkd_fast.runtime import files
from dmkd_fast.training.distiller import Distiller

if TYPE_CHECKING:
    from dmkd_fast.jobs.parts import Parts

SUMMARY = run_dir.SUMMARY


def write(distiller: Distiller, config: DistillConfig, parts: Parts) -> dict[str, Any]:
    """Write student, pictures, summary and model card; return the summary.

    Raises:
        UserError: A file cannot be written. The last checkpoint holds the trained student.
    """
    folder = Path(config.run_dir)
    resume = f"run: {run_dir.resume_command(folder)}"
    with run_dir.writing_results(folder / STUDENT, resume):
        with files.new_folder(folder / STUDENT) as partial:
            spec = replace(parts.student_spec, label_names=parts.test_set.class_names)
            save_classifier(distiller.student.average.module, spec, partial)
        scores = evaluate_run(folder, display=distiller.display).scores
        _draw(distiller, parts, folder, scores["teacher_top1"])
        summary = {
            **{name: scores[name] for name in ("top1", "top5", "teacher_top1", "agreement")},
            **distiller.totals(),
            "denoiser_license": parts.origin.license,
            "teacher_license": parts.teachers.license,
            "run_dir": str(folder),
        }
        _write_card(folder, config, parts, summary)
        files.replace(folder / SUMMARY, [json.dumps(summary, indent=2).encode() + b"\n"])
        files.sync(folder)
    return summary


def _draw(distiller: Distiller, parts: Parts, folder: Path, teacher_top1: float) -> None:
    """Draw samples.png from the ring, and curves.png from the statistics."""
    ring, names = distiller.ring, parts.test_set.class_names
    filled = ring.labels[: ring.num_filled]
    chosen = [(filled == label).nonzero()[:10, 0] for label in range(len(names))]
    if all(len(slots) == 10 for slots in chosen):
        report.grid(ring.images[torch.cat(chosen)], names, folder / "samples.png")
    report.curves(folder / "stats.jsonl", folder / "curves.png", teacher_top1=teacher_top1)


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
