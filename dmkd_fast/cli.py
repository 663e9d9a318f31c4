"""The command line: `dmkd distill | evaluate | pretrain`.

Stands on floor 4. Errors that the user can mend end in one line on stderr and exit code 2; Ctrl-C
ends with exit code 130 and a line that says how to go on. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmkd_fast import config as cfg
from dmkd_fast import durable

OVERRIDES = "Any setting can be changed with section.field=value, for example sampler.num_steps=4."


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on overrides that follow an option; they are meant all the same.
    if not hasattr(options, "overrides") or any("=" not in a or a[0] == "-" for a in rest):
        rest and parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.overrides += rest
    verb: Callable[[argparse.Namespace], dict[str, Any] | None] = options.verb
    try:
        result = verb(options)
    except (cfg.ConfigError, durable.SaveError) as error:
        print(f"dmkd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dmkd: stopped", file=sys.stderr)
        return 130
    if result is not None:
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dmkd", description="Knowledge distillation from diffusion-generated images."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    distill = verbs.add_parser(
        "distill", help="train a student online from generated images", epilog=OVERRIDES,
        description="Generate images, distill a student from a teacher on them, evaluate it on "
        "real test images. Results go to a run directory; the last line of output is JSON.",
    )  # fmt: skip
    _config_arguments(distill)
    either = distill.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true",
        help="go on, with the saved settings, from the newest checkpoint of run_dir (or of the "
        "newest run of this name)",
    )  # fmt: skip
    either.add_argument(
        "--dry-run", action="store_true",
        help="print the resolved settings and the memory plan, and do nothing",
    )  # fmt: skip
    distill.set_defaults(verb=_distill)

    evaluate = verbs.add_parser(
        "evaluate", help="accuracy of a run's student on its real test set",
        description="Load the student that a run saved and measure it again.",
    )  # fmt: skip
    evaluate.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run")
    evaluate.set_defaults(verb=_evaluate)

    pretrain = verbs.add_parser(
        "pretrain", help="train a small teacher or denoiser",
        description="Make what `distill` starts from: a teacher or a denoiser from real images, or "
        "a few-step denoiser from a many-step one.",
    )  # fmt: skip
    kinds = pretrain.add_subparsers(required=True, metavar="KIND")
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
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings to change"
    )


def _distill(options: argparse.Namespace) -> dict[str, Any] | None:
    config = cfg.load(cfg.DistillConfig, options.config, options.overrides)
    from dmkd_fast import job

    if options.dry_run:
        config, parts = job.prepare(config)
        print(cfg.dump(config), end="")
        print("memory plan:")
        for name, count in job.memory_plan(config, parts).items():
            print(f"  {name}: {count:,} bytes ({count / 2**20:.1f} MiB)")
        return None
    _refuse_changes(options)
    return job.run(config, resume=options.resume)


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast import job

    return dict(job.evaluate_run(options.run_dir))


def _pretrain(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast import pretrain, pretrain_diffusion

    _refuse_changes(options)
    if options.kind == "teacher":
        teacher = cfg.load(cfg.TeacherConfig, options.config, options.overrides)
        return pretrain.teacher(teacher, options.data, resume=options.resume)
    if options.kind == "denoiser":
        denoiser = cfg.load(cfg.PretrainDenoiserConfig, options.config, options.overrides)
        return pretrain_diffusion.denoiser(denoiser, options.data, resume=options.resume)
    fewstep = cfg.load(cfg.PretrainFewstepConfig, options.config, options.overrides)
    return pretrain_diffusion.fewstep(fewstep, resume=options.resume)


def _refuse_changes(options: argparse.Namespace) -> None:
    """A resumed run goes on with its saved settings; changing some would be ignored."""
    changed = [text for text in options.overrides if not text.startswith("run_dir=")]
    if options.resume and changed:
        raise cfg.ConfigError(
            f"--resume: got {changed[0]}, expected no setting but run_dir, as the saved ones are "
            "used; remove it, or change config.yaml in the run directory"
        )


if __name__ == "__main__":
    sys.exit(main())
