"""The command line, `dmkd demo | init | distill | generate | evaluate | plan | ...`.

User errors end in one line on stderr and exit code 2. Ctrl-C ends with exit code 130 and a line
that says how to continue. The last line of output is JSON. Under torchrun, only rank 0 prints all
this. Each verb imports what it needs, so that help does not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from dmkd_fast import __version__
from dmkd_fast.jobs.exchange import commands
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.output.streams import GuardedStream, open_closed_streams

if TYPE_CHECKING:
    from dmkd_fast.runtime.distributed import Ranks

OVERRIDES = "Any setting can be changed with section.field=value, for example sampler.num_steps=4."
# Import names of the packages in the extra `distill`; another one that is missing is a bug.
_EXTRA = "diffusers timm torchvision huggingface_hub pydantic yaml rich matplotlib PIL pyarrow"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse rejects overrides that follow an option, so we collect them from `rest`.
    if not hasattr(options, "overrides") or any("=" not in a or a[0] == "-" for a in rest):
        rest and parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.overrides += rest
    if not hasattr(options, "verb"):
        parser.print_help()
        return 0
    open_closed_streams()
    out, err = GuardedStream(sys.stdout, "stdout"), GuardedStream(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)), _logging():
        code = _run(options)
        if options.verb not in _NO_PYTORCH and _ranks().world_size > 1:
            from dmkd_fast.runtime import distributed

            distributed.end_process(code)
    return code


def _run(options: argparse.Namespace) -> int:
    verb: Callable[[argparse.Namespace], dict[str, Any] | None] = options.verb
    result = None
    try:
        if verb not in _NO_PYTORCH:
            _prepare_process(is_alone=verb not in (_distill, _generate))
        result = verb(options)
        if result:
            print(json.dumps(result))
        sys.stdout.flush()
    except KeyboardInterrupt:
        if verb is _generate or _ranks().is_first:
            print("dmkd: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA.split():
            return _report(error, options, result)
        fix = "install what the command needs: pip install 'dmkd_fast[distill]'"
        print(f"dmkd: {package} is not installed; {fix}", file=sys.stderr)
        return 2
    except Exception as error:
        return _report(error, options, result)
    return int(getattr(options, "failed", False))


def _report(error: Exception, options: argparse.Namespace, result: dict[str, Any] | None) -> int:
    """Print an error and return the exit code; raise a bug again, with its traceback."""
    from dmkd_fast.runtime import distributed

    ranks = distributed.read()
    if isinstance(error, UserError | OSError):
        if options.traceback:
            traceback.print_exception(error)
        # Errors raised on every rank are printed by rank 0 only.
        if options.verb is _generate or ranks.is_first or not distributed.is_agreed(error):
            print(f"dmkd: {' '.join(str(error).split())}", file=sys.stderr)
        if result:  # Standard output could not be written.
            print(json.dumps(result), file=sys.stderr)
        return 2
    if isinstance(error, distributed.LostRankError):
        print(f"dmkd: {error}", file=sys.stderr)
        return 1
    if ranks.world_size == 1:
        raise error
    # `main` ends the process of a rank at once, so Python would not print the traceback.
    traceback.print_exception(error)
    return 1


def _prepare_process(*, is_alone: bool) -> None:
    """Set the options of PyTorch for this process, which the command line owns.

    Raises:
        UserError: There are several ranks, and the verb runs as one process.
    """
    from dmkd_fast.runtime.device import keep_freed_memory, make_repeatable

    keep_freed_memory()
    make_repeatable()
    if is_alone and (count := _ranks().world_size) > 1:
        raise UserError(f"torchrun: got {count} ranks, expected one process; run it alone")


def _ranks() -> Ranks:
    from dmkd_fast.runtime import distributed

    return distributed.read()


@contextmanager
def _logging() -> Iterator[None]:
    """Print the warnings that the package logs, one line each."""
    handler = _Handler()
    logger = logging.getLogger("dmkd_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    """Print records on the stderr of the moment, which a live view replaces by its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record in one line."""
        print(f"{record.levelname}: {record.getMessage()}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f"dmkd: {UserError(f'{message}; see {self.prog} --help')}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dmkd", description="Knowledge distillation from diffusion-generated images."
    )
    parser.add_argument("--version", action="version", version=f"dmkd {__version__}")
    verbs = parser.add_subparsers(metavar="VERB")
    shared = _Parser(add_help=False)
    shared.add_argument(
        "--traceback", action="store_true", help="also print where an error was raised"
    )

    job = _Parser(add_help=False, parents=[shared])
    job.add_argument("--quiet", action="store_true", help="show no progress")

    demo = verbs.add_parser(
        "demo",
        parents=[job],
        help="distill a student in about 90 seconds, without any file or network",
        epilog=OVERRIDES,
        description="Generate images with the embedded denoiser, train a small student on them, "
        "and let it classify real images, which it has never seen. The job is configs/demo.yaml.",
    )
    _overrides_argument(demo)
    demo.set_defaults(verb=_demo)

    init = verbs.add_parser(
        "init",
        parents=[shared],
        help="write a config to start from",
        description="Write one of the shipped configs into the current folder, with a comment on "
        "every setting. Without a name, list the configs.",
    )
    init.add_argument("name", nargs="?", metavar="NAME", help="name of a shipped config")
    init.set_defaults(verb=_init)

    distill = verbs.add_parser(
        "distill",
        parents=[job],
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
    distill.set_defaults(verb=_distill)

    generate = verbs.add_parser(
        "generate",
        parents=[job],
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
    generate.set_defaults(verb=_generate)

    evaluation_parser = verbs.add_parser(
        "evaluate",
        parents=[job],
        help="accuracy of a student or any classifier on real images",
        description="Measure the student that a run saved, or any trained classifier, on labeled "
        "images: top-1, top-5, calibration error, agreement with the run's teachers, and a table "
        "by class. The last line of output is JSON.",
    )
    evaluation_parser.add_argument(
        "what",
        metavar="RUN_DIR|CLASSIFIER",
        help="directory of a run; or a classifier: a folder with config.json, embedded:NAME, "
        "hf-hub:OWNER/NAME@COMMIT, or torchvision:NAME or a timm name for published weights",
    )
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
    evaluation_parser.set_defaults(verb=_evaluate)

    commands.add_verbs(verbs, shared)

    pretraining = verbs.add_parser(
        "pretrain",
        help="train a small teacher or denoiser",
        description="Make what `distill` starts from: a teacher or a denoiser from real images, or "
        "a few-step denoiser from a many-step one.",
    )
    kinds = pretraining.add_subparsers(required=True, metavar="KIND")
    for kind, text in (
        ("teacher", "a classifier on real images"),
        ("denoiser", "a class-conditional pixel DiT on real images"),
        ("fewstep", "a denoiser to do in a few steps what it does in many"),
    ):
        sub = kinds.add_parser(
            kind, parents=[job], help=text, description=f"Train {text}.", epilog=OVERRIDES
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
        sub.set_defaults(verb=_pretrain, kind=kind)

    plan = verbs.add_parser(
        "plan",
        parents=[shared],
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
    plan.set_defaults(verb=_plan)

    doctor = verbs.add_parser(
        "doctor",
        parents=[shared],
        help="check this machine, and a job on it",
        epilog=OVERRIDES,
        description="Check versions, kernels, GPU, memory, disk and loopback; with a config also "
        "the job: class order, normalization, frozen teachers, NaN, waits for the device. One line "
        "each: what it is, what it means, what to do. Exit code 1 if something is wrong.",
    )
    _config_arguments(doctor, nargs="?")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(verb=_doctor)

    report = verbs.add_parser(
        "report",
        parents=[shared],
        help="pages about runs: results, curves, images, mistakes, time",
        description="Without arguments, list the runs in runs/. With one run, write report.html in "
        "its directory; a run that goes on keeps that page up to date by itself. With several "
        "runs, write one page that compares them.",
    )
    report.add_argument("runs", nargs="*", metavar="RUN_DIR", help="directories of runs")
    report.add_argument("--out", type=Path, metavar="FILE", help="HTML file to write")
    report.add_argument("--json", action="store_true", help="print all figures as one JSON line")
    report.set_defaults(verb=_report_runs)

    config = verbs.add_parser(
        "config",
        parents=[shared],
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
    config.set_defaults(verb=_config)
    return parser


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


def _demo(options: argparse.Namespace) -> dict[str, Any]:
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


def _init(options: argparse.Namespace) -> dict[str, Any] | None:
    from dmkd_fast.config import shipped

    if options.name is None:
        for name, text in shipped.shipped().items():
            print(f"{name:<22} {text}")
        return None
    path = shipped.init(options.name, Path())
    print(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    return {"config": str(path)}


def _distill(options: argparse.Namespace) -> dict[str, Any] | None:
    from dmkd_fast.jobs import distill

    if options.dry_run:
        for line in distill.dry_run(options.config, options.overrides):
            print(line)
        return None
    resume, show = options.resume, not options.quiet
    return distill.run(options.config, options.overrides, resume=resume, show=show)


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.config.jobs import DistillConfig
    from dmkd_fast.config.loading import load_config
    from dmkd_fast.jobs import generate

    words = ["dmkd", "generate", options.config, *options.overrides, "--out", str(options.out)]
    words += ["--num-images", str(options.num_images)]
    if options.shard is not None:
        words += ["--shard", "{}/{}".format(*options.shard)]
    if options.images_per_shard is not None:
        words += ["--images-per-shard", str(options.images_per_shard)]
    return generate.run(
        load_config(DistillConfig, options.config, options.overrides),
        options.out,
        options.num_images,
        job_slice=options.shard,
        images_per_shard=options.images_per_shard,
        command=shlex.join(words),
        show=not options.quiet,
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.jobs.evaluate import evaluate
    from dmkd_fast.jobs.inspect.report import print_classes

    show = not options.quiet
    found = evaluate(options.what, options.data, classes=options.classes, show=show)
    print(found.describe_input())
    print_classes(found.classes)
    return found.summary()


def _report_runs(options: argparse.Namespace) -> dict[str, Any] | None:
    from dmkd_fast.jobs.inspect import report

    if options.runs:
        found = report.report(options.runs, options.out)
        return found if options.json else {"report": found["report"]}
    return report.show_runs(as_json=options.json)


def _pretrain(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.config import jobs as configs
    from dmkd_fast.config.loading import load_config
    from dmkd_fast.jobs import run_dir
    from dmkd_fast.jobs.pretrain.classifier import pretrain_teacher
    from dmkd_fast.jobs.pretrain.denoiser import pretrain_denoiser
    from dmkd_fast.jobs.pretrain.fewstep import pretrain_fewstep

    if options.resume:
        run_dir.refuse_changes(options.overrides)
    source = (options.config, options.overrides)
    how = {"resume": options.resume, "show": not options.quiet}
    if options.kind == "teacher":
        teacher = load_config(configs.TeacherConfig, *source)
        return pretrain_teacher(teacher, options.data, **how)
    if options.kind == "denoiser":
        denoiser = load_config(configs.PretrainDenoiserConfig, *source)
        return pretrain_denoiser(denoiser, options.data, **how)
    return pretrain_fewstep(load_config(configs.PretrainFewstepConfig, *source), **how)


def _plan(options: argparse.Namespace) -> dict[str, Any] | None:
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


def _doctor(options: argparse.Namespace) -> dict[str, Any] | None:
    from dmkd_fast.jobs.inspect import doctor

    findings = []
    for finding in doctor.examine(options.config, options.overrides):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    options.failed = not all(finding.is_ok for finding in findings)
    return doctor.summary(findings) if options.json else None


def _config(options: argparse.Namespace) -> None:
    from dmkd_fast.config import reference

    if options.schema:
        print(json.dumps(reference.schema(options.job), indent=1))
        return
    for setting in reference.describe(options.job, options.name):
        print(setting)


# Verbs that start at once, as they neither train nor run a network.
_NO_PYTORCH = (_config, _init, _report_runs)
