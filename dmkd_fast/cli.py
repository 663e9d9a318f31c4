"""The command line, `dmkd distill | generate | evaluate | pretrain | config`.

User errors end in one line on stderr and exit code 2. Ctrl-C ends with exit code 130 and a line
that says how to continue. The last line of output is JSON. Under torchrun, only rank 0 prints all
this.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from dmkd_fast.config.jobs import (
    DistillConfig,
    PretrainDenoiserConfig,
    PretrainFewstepConfig,
    TeacherConfig,
)
from dmkd_fast.config.loading import dump_config, load_config
from dmkd_fast.runtime import distributed
from dmkd_fast.runtime.device import keep_freed_memory, make_repeatable
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.runtime.streams import GuardedStream, open_closed_streams

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
    keep_freed_memory()
    make_repeatable()
    open_closed_streams()
    out, err = GuardedStream(sys.stdout, "stdout"), GuardedStream(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        code = _run(options)
        if distributed.read().world_size > 1:
            distributed.end_process(code)
    return code


def _run(options: argparse.Namespace) -> int:
    verb: Callable[[argparse.Namespace], dict[str, Any] | None] = options.verb
    # Errors raised on every rank are printed by rank 0 only.
    tells = verb is _generate or distributed.read().is_first
    result = None
    try:
        if verb in (_evaluate, _pretrain) and (count := distributed.read().world_size) > 1:
            raise UserError(f"torchrun: got {count} ranks, expected one process; run it alone")
        result = verb(options)
        if result:
            print(json.dumps(result))
        sys.stdout.flush()
    except (UserError, OSError) as error:
        if tells or not distributed.is_agreed(error):
            print(f"dmkd: {' '.join(str(error).split())}", file=sys.stderr)
        if result:  # Standard output could not be written.
            print(json.dumps(result), file=sys.stderr)
        return 2
    except distributed.Lost as error:
        print(f"dmkd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if tells:
            print("dmkd: stopped", file=sys.stderr)
        return 130
    except Exception:
        if distributed.read().world_size == 1:
            raise
        # `main` ends the process of a rank at once, so Python would not print the traceback.
        traceback.print_exc()
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f"dmkd: {UserError(f'{message}; see {self.prog} --help')}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dmkd", description="Knowledge distillation from diffusion-generated images."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    distill = verbs.add_parser(
        "distill",
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
        type=_part,
        metavar="i/n",
        help="make part i of n, counted from 0; the result does not depend on n (default: all, or "
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
        type=Path,
        metavar="DIR",
        help="folder with idx files, one folder per class, or WebDataset shards (default: the "
        "run's own test set)",
    )
    evaluation_parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one a line, in the order of the classifier's outputs (default: "
        "DIR/classes.txt, else the sorted class folders)",
    )
    evaluation_parser.set_defaults(verb=_evaluate)

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
        sub = kinds.add_parser(kind, help=text, description=f"Train {text}.", epilog=OVERRIDES)
        _config_arguments(sub)
        if kind != "fewstep":
            sub.add_argument(
                "--data", type=Path, required=True, metavar="DIR", help="folder with idx files"
            )
        sub.add_argument(
            "--resume", action="store_true", help="go on from the newest checkpoint of run_dir"
        )
        sub.set_defaults(verb=_pretrain, kind=kind)

    config = verbs.add_parser(
        "config",
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


def _part(text: str) -> tuple[int, int]:
    part, _, count = text.partition("/")
    good = all(re.fullmatch("[0-9]{1,9}", number) for number in (part, count))
    if not good or int(part) >= int(count):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected i/n with 0 <= i < n, as 0/3")
    return int(part), int(count)


def _distill(options: argparse.Namespace) -> dict[str, Any] | None:
    mine = distributed.join()
    with mine.agreed():
        config = load_config(DistillConfig, options.config, options.overrides)
        _refuse_changes(options)
    from dmkd_fast.jobs import memory
    from dmkd_fast.jobs.distill import run
    from dmkd_fast.jobs.parts import prepare

    if options.dry_run:
        if not mine.is_first:
            return None
        config, parts = prepare(config, mine)
        print(dump_config(config), end="")
        print("memory plan:" if mine.world_size == 1 else "memory plan of each rank:")
        for name, count in memory.plan(config, parts, mine).items():
            print(f"  {name}: {count:,} bytes ({count / 2**20:.1f} MiB)")
        most = memory.check(config, parts, mine)
        print(f"largest ring.capacity_images that fits: {most:,}")
        return None
    return run(config, resume=options.resume, ranks=mine)


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    config = load_config(DistillConfig, options.config, options.overrides)
    from dmkd_fast.jobs import generate

    words = ["dmkd", "generate", options.config, *options.overrides, "--out", str(options.out)]
    words += ["--num-images", str(options.num_images)]
    if options.shard is not None:
        words += ["--shard", "{}/{}".format(*options.shard)]
    if options.images_per_shard is not None:
        words += ["--images-per-shard", str(options.images_per_shard)]
    return generate.run(
        config,
        options.out,
        options.num_images,
        part=options.shard,
        images_per_shard=options.images_per_shard,
        command=shlex.join(words),
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.jobs import evaluate

    folder = Path(options.what)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if options.classes is not None and options.data is None:
            raise UserError("--classes: got it without --data, expected both; add --data DIR")
        found = evaluate.evaluate_run(folder, data=options.data, classes=options.classes)
    elif options.data is None:
        raise UserError(
            f"--data: got none for {options.what}, which is not the directory of a run; add "
            "--data DIR with labeled images"
        )
    else:
        found = evaluate.evaluate_classifier(
            options.what, data=options.data, classes=options.classes
        )
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
    from dmkd_fast.jobs.pretrain.classifier import pretrain_teacher
    from dmkd_fast.jobs.pretrain.denoiser import pretrain_denoiser
    from dmkd_fast.jobs.pretrain.fewstep import pretrain_fewstep

    _refuse_changes(options)
    if options.kind == "teacher":
        teacher = load_config(TeacherConfig, options.config, options.overrides)
        return pretrain_teacher(teacher, options.data, resume=options.resume)
    if options.kind == "denoiser":
        denoiser = load_config(PretrainDenoiserConfig, options.config, options.overrides)
        return pretrain_denoiser(denoiser, options.data, resume=options.resume)
    fewstep = load_config(PretrainFewstepConfig, options.config, options.overrides)
    return pretrain_fewstep(fewstep, resume=options.resume)


def _config(options: argparse.Namespace) -> None:
    from dmkd_fast.config import reference

    if options.schema:
        print(json.dumps(reference.schema(options.job), indent=1))
        return
    for setting in reference.describe(options.job, options.name):
        print(setting)


def _refuse_changes(options: argparse.Namespace) -> None:
    """Refuse changed settings with --resume, which uses the saved settings of the run."""
    changed = [text for text in options.overrides if not text.startswith("run_dir=")]
    if options.resume and changed:
        raise UserError(
            f"--resume: got {changed[0]}, expected no setting but run_dir, as the saved ones are "
            "used; remove it, or change config.yaml in the run directory"
        )


if __name__ == "__main__":
    sys.exit(main())
