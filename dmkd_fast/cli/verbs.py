"""What each verb of the command line does with its parsed arguments.

Each verb imports what it needs, so that help does not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from dmkd_fast.runtime.errors import UserError, invalid

OWN_DATA = "own-data"


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Run the demo job, and say what its student can do."""
    from dmkd_fast.config.shipped import CONFIGS
    from dmkd_fast.jobs import distill

    summary = distill.run(CONFIGS / "demo.yaml", options.overrides, show=not options.quiet)
    page = Path(summary["run_dir"]) / "report.html"
    print(
        f"A student that has seen no real image gets {summary['top1']:.1%} of 10,000 real ones "
        f"right, its teacher {summary['teacher_top1']:.1%}; {summary['wall_s']:.0f} s in all."
    )
    if page.is_file():
        print(f"report: {page}")
    print("next: dmkd init fashion_mnist; dmkd distill fashion_mnist.yaml")
    return summary


def init(options: argparse.Namespace) -> dict[str, Any] | None:
    """Write a shipped config or those of an own data set here, or list the names."""
    from dmkd_fast.config import shipped

    if (options.name == OWN_DATA) != (options.data is not None):
        raise invalid("--data", options.data, f"a folder with {OWN_DATA}, and none with others")
    if options.name == OWN_DATA:
        from dmkd_fast.jobs.pretrain import own_data

        return own_data.init(options.data, Path())
    if options.name is None:
        print(f"{OWN_DATA:<22} A folder of images to a student, with --data DIR")
        for name, text in shipped.shipped().items():
            print(f"{name:<22} {text}")
        return None
    path = shipped.init(options.name, Path())
    print(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    return {"config": str(path)}


def distill(options: argparse.Namespace) -> dict[str, Any] | None:
    """Run a distillation job, or print what it would do."""
    from dmkd_fast.jobs import distill

    if options.dry_run and options.profile:
        raise UserError("--profile: got it with --dry-run, which takes no step; remove one of both")
    if options.dry_run:
        for line in distill.dry_run(options.config, options.overrides):
            print(line)
        return None
    return distill.run(
        options.config,
        options.overrides,
        resume=options.resume,
        show=not options.quiet,
        profile_steps=options.profile,
    )


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Make images as shards on disk."""
    from dmkd_fast.config.jobs import DistillConfig
    from dmkd_fast.config.loading import load_config
    from dmkd_fast.jobs import generate
    from dmkd_fast.jobs.stored_logits import Wanted

    words = ["dmkd", "generate", options.config, *options.overrides, "--out", str(options.out)]
    words += ["--num-images", str(options.num_images)]
    if options.shard is not None:
        words += ["--shard", "{}/{}".format(*options.shard)]
    if options.images_per_shard is not None:
        words += ["--images-per-shard", str(options.images_per_shard)]
    top_k, views, wanted = options.teacher_logits, options.views, None
    if top_k is not None:
        wanted = Wanted(top_k or None, *([] if views is None else [views]))
        words += ["--teacher-logits", f"topk:{top_k}" if top_k else "full"]
        words += ["--views", str(wanted.views_per_image)]
    elif views is not None:
        raise invalid("--views", f"{views} without --teacher-logits", "both", "add it")
    return generate.run(
        load_config(DistillConfig, options.config, options.overrides),
        options.out,
        options.num_images,
        job_slice=options.shard,
        images_per_shard=options.images_per_shard,
        logits=wanted,
        command=shlex.join(words),
        show=not options.quiet,
    )


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a run's student or any classifier."""
    from dmkd_fast.jobs.evaluate import evaluate
    from dmkd_fast.jobs.report.runs import print_classes

    show = not options.quiet
    found = evaluate(options.what, options.data, classes=options.classes, show=show)
    print(found.describe_input())
    print_classes(found.classes)
    return found.summary()


def report_runs(options: argparse.Namespace) -> dict[str, Any] | None:
    """List runs, or write the page of one or several."""
    from dmkd_fast.jobs.report import runs as report

    if options.runs:
        found = report.report(options.runs, options.out)
        short: dict[str, Any] = {
            name: found[name] for name in ("report", "run_dir") if name in found
        }
        return found if options.json else short
    if options.out is not None:
        raise invalid("--out", f"{options.out} without a RUN_DIR", "both", "name a run")
    return report.show_runs(as_json=options.json)


def pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Train a teacher or a denoiser."""
    from dmkd_fast.config import jobs as configs
    from dmkd_fast.jobs import run_dir
    from dmkd_fast.jobs.pretrain.classifier import pretrain_teacher
    from dmkd_fast.jobs.pretrain.denoiser import pretrain_denoiser
    from dmkd_fast.jobs.pretrain.fewstep import pretrain_fewstep

    source, resume = (options.config, options.overrides), options.resume
    how = {"resume": resume, "show": not options.quiet}
    if options.kind == "teacher":
        teacher = run_dir.load(configs.TeacherConfig, *source, resume=resume)
        return pretrain_teacher(teacher, options.data, **how)
    if options.kind == "denoiser":
        denoiser = run_dir.load(configs.PretrainDenoiserConfig, *source, resume=resume)
        return pretrain_denoiser(denoiser, options.data, **how)
    fewstep = run_dir.load(configs.PretrainFewstepConfig, *source, resume=resume)
    return pretrain_fewstep(fewstep, **how)


def plan(options: argparse.Namespace) -> dict[str, Any] | None:
    """Predict work, memory and time of a job."""
    from dmkd_fast.jobs.inspect import plan

    found = plan.plan(
        options.config,
        options.overrides,
        images_per_s=options.images_per_s,
        views_per_s=options.views_per_s,
        gpu=options.gpu,
    )
    if options.json:
        return found
    for line in [*plan.memory_lines(found["memory_bytes"]), *plan.lines(found)]:
        print(line)
    return None


def doctor(options: argparse.Namespace) -> dict[str, Any] | None:
    """Check this machine, and a job on it."""
    from dmkd_fast.jobs.inspect import doctor

    findings = []
    for finding in doctor.examine(options.config, options.overrides):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    options.failed = not all(finding.is_ok for finding in findings)
    return doctor.summary(findings) if options.json else None


def config(options: argparse.Namespace) -> None:
    """Describe settings, or print a schema."""
    from dmkd_fast.config import reference

    if options.schema:
        print(json.dumps(reference.schema(options.job), indent=1))
        return
    for setting in reference.describe(options.job, options.name):
        print(setting)


# Verbs that start at once, as they neither train nor run a network.
NO_PYTORCH = (config, init, report_runs)
