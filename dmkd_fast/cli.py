"""The command line, `dmkd distill | generate | evaluate | predict | export | ...`.

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
from dmkd_fast.runtime.streams import GuardedStream, open_closed_streams

if TYPE_CHECKING:
    from dmkd_fast.runtime.distributed import Ranks

OVERRIDES = "Any setting can be changed with section.field=value, for example sampler.num_steps=4."


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
        if options.verb is not _config and _ranks().world_size > 1:
            from dmkd_fast.runtime import distributed

            distributed.end_process(code)
    return code


def _run(options: argparse.Namespace) -> int:
    verb: Callable[[argparse.Namespace], dict[str, Any] | None] = options.verb
    result = None
    try:
        if verb is not _config:
            _prepare_process(is_alone=verb not in (_distill, _generate))
        result = verb(options)
        if result:
            print(json.dumps(result))
        sys.stdout.flush()
    except KeyboardInterrupt:
        if verb is _generate or _ranks().is_first:
            print("dmkd: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, options, result)
    return 0


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
    if isinstance(error, distributed.Lost):
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
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("dmkd_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


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

    distill = verbs.add_parser(
        "distill",
        parents=[shared],
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
        help="print the resolved settings and the memory plan, and do nothing",
    )
    distill.set_defaults(verb=_distill)

    generate = verbs.add_parser(
        "generate",
        parents=[shared],
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
        parents=[shared],
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
        "DIR/classes.txt, else the sorted class folders)",
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
            kind, parents=[shared], help=text, description=f"Train {text}.", epilog=OVERRIDES
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


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings to change"
    )


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive whole number")
    return int(text)


def _job_slice(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    good = all(re.fullmatch("[0-9]{1,9}", number) for number in (index, count))
    if not good or int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected i/n with 0 <= i < n, as 0/3")
    return int(index), int(count)


def _distill(options: argparse.Namespace) -> dict[str, Any] | None:
    from dmkd_fast.jobs import distill

    if options.dry_run:
        for line in distill.dry_run(options.config, options.overrides):
            print(line)
        return None
    return distill.run(options.config, options.overrides, resume=options.resume)


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
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.jobs.evaluate import evaluate

    found = evaluate(options.what, options.data, classes=options.classes)
    print(found.describe_input())
    _print_classes(found.classes)
    return found.summary()


def _print_classes(classes: dict[str, dict[str, Any]]) -> None:
    """Print a table of all classes, or of the 20 with the lowest top-1 if there are over 100."""
    from rich.console import Console
    from rich.table import Table

    rows = [(name, row) for name, row in classes.items() if row["images"]]
    title = None
    if len(rows) > 100:
        rows = sorted(rows, key=lambda row: row[1]["top1"])[:20]
        title = f"the 20 lowest of {len(classes)} classes"
    table = Table(title=title)
    table.add_column("class", overflow="fold")
    for column in ("images", "top-1", "top-5"):
        table.add_column(column, justify="right")
    for name, row in rows:
        table.add_row(name, f"{row['images']:,}", f"{row['top1']:.4f}", f"{row['top5']:.4f}")
    Console(markup=False).print(table)


def _pretrain(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.config import jobs as configs
    from dmkd_fast.config.loading import load_config
    from dmkd_fast.jobs import run_dir
    from dmkd_fast.jobs.pretrain.classifier import pretrain_teacher
    from dmkd_fast.jobs.pretrain.denoiser import pretrain_denoiser
    from dmkd_fast.jobs.pretrain.fewstep import pretrain_fewstep

    if options.resume:
        run_dir.refuse_changes(options.overrides)
    source, resume = (options.config, options.overrides), options.resume
    if options.kind == "teacher":
        teacher = load_config(configs.TeacherConfig, *source)
        return pretrain_teacher(teacher, options.data, resume=resume)
    if options.kind == "denoiser":
        denoiser = load_config(configs.PretrainDenoiserConfig, *source)
        return pretrain_denoiser(denoiser, options.data, resume=resume)
    return pretrain_fewstep(load_config(configs.PretrainFewstepConfig, *source), resume=resume)


def _config(options: argparse.Namespace) -> None:
    from dmkd_fast.config import reference

    if options.schema:
        print(json.dumps(reference.schema(options.job), indent=1))
        return
    for setting in reference.describe(options.job, options.name):
        print(setting)
