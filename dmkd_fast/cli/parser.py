"""The arguments of the command line."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from dmkd_fast import __version__
from dmkd_fast.cli import verbs
from dmkd_fast.jobs.exchange import commands
from dmkd_fast.runtime.errors import UserError

OVERRIDES = "Any setting can be changed with section.field=value, for example sampler.num_steps=4."


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f"dmkd: {UserError(f'{message}; see {self.prog} --help')}\n")


def new_parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="dmkd", description="Knowledge distillation from diffusion-generated images."
    )
    parser.add_argument("--version", action="version", version=f"dmkd {__version__}")
    parsers = parser.add_subparsers(metavar="VERB")
    shared = Parser(add_help=False)
    shared.add_argument(
        "--traceback", action="store_true", help="also print where an error was raised"
    )

    job = Parser(add_help=False, parents=[shared])
    job.add_argument("--quiet", action="store_true", help="show no progress")
    _add_demo(parsers, job)
    _add_init(parsers, shared)
    _add_distill(parsers, job)
    _add_generate(parsers, job)
    _add_evaluate(parsers, job)
    commands.add_verbs(parsers, shared)
    _add_pretrain(parsers, job)
    _add_plan(parsers, shared)
    _add_doctor(parsers, shared)
    _add_report(parsers, shared)
    _add_config(parsers, shared)
    return parser


def _add_demo(parsers: Any, parent: Parser) -> None:
    demo = parsers.add_parser(
        "demo",
        parents=[parent],
        help="distill a student at reduced size, without any file or network",
        epilog=OVERRIDES,
        description="Generate images with the embedded denoiser, train a small student on them, "
        "and let it classify real images, which it has never seen. The job is configs/demo.yaml.",
    )
    _overrides_argument(demo)
    demo.set_defaults(verb=verbs.demo)


def _add_init(parsers: Any, parent: Parser) -> None:
    init = parsers.add_parser(
        "init",
        parents=[parent],
        help="write a config to start from",
        description="Write one of the shipped configs into the current folder, with a comment on "
        "every setting; or with `own-data --data DIR` the configs from a folder of images to a "
        "student, and print the commands with the minutes they take here. Without a name, list "
        "the configs.",
    )
    init.add_argument(
        "name", nargs="?", metavar="NAME", help="name of a shipped config, or own-data"
    )
    init.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of labeled images, for own-data only"
    )
    init.set_defaults(verb=verbs.init)


def _add_distill(parsers: Any, parent: Parser) -> None:
    distill = parsers.add_parser(
        "distill",
        parents=[parent],
        help="train a student from generated images",
        epilog=OVERRIDES,
        description="Generate images, distill a student from a teacher on them, evaluate it on "
        "real test images. Results go to a run directory; the last line of output is JSON.",
    )
    _config_arguments(distill)
    either = distill.add_mutually_exclusive_group()
    either.add_argument(
        "--resume",
        action="store_true",
        help="go on, with the saved settings, from the newest checkpoint of run_dir (or of the "
        "newest run of this name)",
    )
    either.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved settings and the plan of the run, and do nothing",
    )
    distill.add_argument(
        "--profile",
        type=_count,
        metavar="STEPS",
        help="trace that many steps: profile/trace.json and a table by piece in the run directory",
    )
    distill.set_defaults(verb=verbs.distill)


def _add_generate(parsers: Any, parent: Parser) -> None:
    generate = parsers.add_parser(
        "generate",
        parents=[parent],
        help="make images for later, as shards on disk",
        epilog=OVERRIDES,
        description="Make the images that `distill` with the same settings would make, and write "
        "them as WebDataset shards with a parquet manifest. Run the same command again after a "
        "stop: finished shards are kept. Several jobs fill one directory with --shard.",
    )
    _config_arguments(generate)
    generate.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory")
    generate.add_argument(
        "--num-images", type=_count, required=True, metavar="N", help="images in all, of all jobs"
    )
    generate.add_argument(
        "--shard",
        type=_job_slice,
        metavar="i/n",
        help="make slice i of n, counted from 0; the result does not depend on n (default: all, or "
        "rank/ranks under torchrun)",
    )
    generate.add_argument(
        "--images-per-shard",
        type=_count,
        metavar="N",
        help="images per tar file, a multiple of sampler.micro_batch_images (about 1,024)",
    )
    generate.add_argument(
        "--teacher-logits",
        type=_logits,
        metavar="full|topk:K",
        help="also store the teacher's logits, all or the K largest, as float16 in parquet files",
    )
    generate.add_argument(
        "--views", type=_count, metavar="V", help="views per image whose logits are stored (8)"
    )
    generate.set_defaults(verb=verbs.generate)


def _add_evaluate(parsers: Any, parent: Parser) -> None:
    evaluation_parser = parsers.add_parser(
        "evaluate",
        parents=[parent],
        help="accuracy of a student or any classifier on real images",
        description="Measure the student that a run saved, or any trained classifier, on labeled "
        "images: top-1, top-5, calibration error, agreement with the run's teachers, and a table "
        "by class. The last line of output is JSON.",
    )
    evaluation_parser.add_argument("what", metavar="RUN_DIR|CLASSIFIER", help=commands.WHAT)
    evaluation_parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder with idx files, one folder per class, or WebDataset shards; or embedded:NAME "
        "(default: the run's own test set)",
    )
    evaluation_parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one a line, in the order of the classifier's outputs (default: "
        "those that the classifier states, else DIR/classes.txt, else the sorted class folders)",
    )
    evaluation_parser.set_defaults(verb=verbs.evaluate)


def _add_pretrain(parsers: Any, parent: Parser) -> None:
    pretraining = parsers.add_parser(
        "pretrain",
        help="train a small teacher or denoiser",
        description="Make what `distill` starts from: a teacher or a denoiser from real images, or "
        "a few-step denoiser from a many-step one.",
    )
    kinds = pretraining.add_subparsers(required=True, metavar="KIND")
    for kind, text in (
        ("teacher", "a classifier on real images"),
        ("denoiser", "a class-conditional DiT on real images"),
        ("fewstep", "a denoiser to do in a few steps what it does in many"),
    ):
        sub = kinds.add_parser(
            kind, parents=[parent], help=text, description=f"Train {text}.", epilog=OVERRIDES
        )
        _config_arguments(sub)
        if kind != "fewstep":
            sub.add_argument(
                "--data",
                type=Path,
                required=True,
                metavar="DIR",
                help="folder with idx files, one folder per class, or WebDataset shards; or with "
                "train/ and test/ of these",
            )
        sub.add_argument(
            "--resume", action="store_true", help="go on from the newest checkpoint of run_dir"
        )
        sub.set_defaults(verb=verbs.pretrain, kind=kind)


def _add_plan(parsers: Any, parent: Parser) -> None:
    plan = parsers.add_parser(
        "plan",
        parents=[parent],
        help="predict work, memory and time of a job",
        epilog=OVERRIDES,
        description="Predict what `distill` with the same settings takes: operations per image and "
        "view, memory of every part, wall time, and what other reuse would cost. Measures images/s "
        "and views/s here for some seconds, unless they are given.",
    )
    _config_arguments(plan)
    plan.add_argument("--images-per-s", type=_rate, metavar="R", help="generated images per second")
    plan.add_argument("--views-per-s", type=_rate, metavar="R", help="trained views per second")
    plan.add_argument(
        "--gpu", metavar="NAME", help="estimate both rates for a GPU, as h100, and plan its memory"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of text")
    plan.set_defaults(verb=verbs.plan)


def _add_doctor(parsers: Any, parent: Parser) -> None:
    doctor = parsers.add_parser(
        "doctor",
        parents=[parent],
        help="check this machine, and a job on it",
        epilog=OVERRIDES,
        description="Check versions, kernels, GPU, memory, disk and loopback; with a config also "
        "the job: class order, normalization, frozen teachers, NaN, waits for the device. One line "
        "each: what it is, what it means, what to do. Exit code 1 if something is wrong.",
    )
    _config_arguments(doctor, nargs="?")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(verb=verbs.doctor)


def _add_report(parsers: Any, parent: Parser) -> None:
    report = parsers.add_parser(
        "report",
        parents=[parent],
        help="pages about runs: results, curves, images, mistakes, time",
        description="Without arguments, list the runs in runs/. With one run, write report.html in "
        "its directory; a run that goes on keeps that page up to date by itself. With several "
        "runs, write one page that compares them.",
    )
    report.add_argument("runs", nargs="*", metavar="RUN_DIR", help="directories of runs")
    report.add_argument("--out", type=Path, metavar="FILE", help="HTML file to write")
    report.add_argument("--json", action="store_true", help="print all figures as one JSON line")
    report.set_defaults(verb=verbs.report_runs)


def _add_config(parsers: Any, parent: Parser) -> None:
    config = parsers.add_parser(
        "config",
        parents=[parent],
        help="describe the settings",
        description="Print type, default, range and meaning of every setting, or of one section "
        "or field.",
    )
    config.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="SECTION[.FIELD]",
        help="what to describe (default: all settings)",
    )
    config.add_argument(
        "--job",
        choices=("distill", "teacher", "denoiser", "fewstep"),
        default="distill",
        help="whose settings: `distill` (also `generate`), or a kind of `pretrain`",
    )
    config.add_argument(
        "--schema", action="store_true", help="print the JSON schema of the whole file instead"
    )
    config.set_defaults(verb=verbs.config)


def _config_arguments(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs=nargs, help="YAML file, see configs/")
    _overrides_argument(parser)


def _overrides_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings to change"
    )


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive whole number")
    return int(text)


def _logits(text: str) -> int:
    """Return K of `topk:K`, and 0 for `full`."""
    if text == "full":
        return 0
    if not re.fullmatch("topk:[0-9]{1,6}", text) or int(text[5:]) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected full or topk:K, as topk:10")
    return int(text[5:])


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return rate


def _job_slice(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    good = all(re.fullmatch("[0-9]{1,9}", number) for number in (index, count))
    if not good or int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected i/n with 0 <= i < n, as 0/3")
    return int(index), int(count)
