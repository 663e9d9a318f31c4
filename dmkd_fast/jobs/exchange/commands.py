"""The verbs `dmkd predict | export | import`: their arguments and their output."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmkd_fast.runtime.errors import UserError, invalid

WHAT = (
    "directory of a run; or a classifier: a folder with config.json, embedded:NAME, "
    "hf-hub:OWNER/NAME@COMMIT, or torchvision:NAME or a timm name for published weights"
)


def add_verbs(verbs: Any, shared: argparse.ArgumentParser) -> None:
    """Add the verbs to the command line.

    Args:
        verbs: Subparsers of the command line.
        shared: Parser with the options of all verbs.
    """
    predict = verbs.add_parser(
        "predict",
        parents=[shared],
        help="classes of image files",
        description="Print the most probable classes of image files, with probabilities.",
    )
    predict.add_argument("what", metavar="RUN_DIR|CLASSIFIER", help=WHAT)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    predict.add_argument(
        "--top", type=_count, default=5, metavar="N", help="classes to print (default: 5)"
    )
    predict.add_argument("--json", action="store_true", help="print one line of JSON only")
    predict.set_defaults(verb=_predict)

    export = verbs.add_parser(
        "export",
        parents=[shared],
        help="write a student for timm, torch.export or ONNX",
        description="Write a trained classifier in another format. The result is loaded again by "
        "the loader of that format and compared on the test images: the same top-1 predictions, "
        "and logits within 1e-4 in float32.",
    )
    export.add_argument("what", metavar="RUN_DIR|CLASSIFIER", help=WHAT)
    export.add_argument(
        "--to",
        choices=("timm", "pt2", "onnx"),
        required=True,
        help="a folder for timm and the Hub, a program of torch.export, or an ONNX file",
    )
    export.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to create (default: RUN_DIR/export-FORMAT)"
    )
    export.add_argument(
        "--data",
        metavar="DIR",
        help="labeled images to compare on, as for `evaluate` (default: the run's own test set)",
    )
    export.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names of --data, one a line"
    )
    export.add_argument(
        "--normalize",
        action="store_true",
        help="take pixels in [0, 1], and normalize them inside the network; not for timm",
    )
    export.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the folder to this repository on the Hub, after `hf auth login`",
    )
    export.set_defaults(verb=_export)

    importing = verbs.add_parser(
        "import",
        help="take over a network trained elsewhere",
        description="Turn a network trained elsewhere into a folder that is safe to load.",
    )
    kinds = importing.add_subparsers(required=True, metavar="KIND")
    teacher = kinds.add_parser(
        "teacher",
        parents=[shared],
        help="a classifier from a PyTorch checkpoint",
        description="Turn a checkpoint of timm's train.py, torchvision, Lightning or torch.save "
        "into a folder with config.json and model.safetensors. It is read with weights_only=True, "
        "which runs no code. Averaged weights are preferred.",
    )
    teacher.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="file of torch.save, safetensors"
    )
    teacher.add_argument("--arch", metavar="NAME", help="as in `student.arch`")
    teacher.add_argument(
        "--zero-shot",
        metavar="FOLDER",
        help="in place of a checkpoint: a folder of transformers' CLIPModel, or "
        "hf-hub:OWNER/NAME@COMMIT; --classes gives the names for its prompts",
    )
    teacher.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="prompt of every class, with {name} for its name (default: a photo of a {name}); "
        "give it several times to average several prompts",
    )
    for name, what in (("mean", "means"), ("std", "standard deviations")):
        teacher.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{what} by channel, of pixels in [0, 1] (default: those in the checkpoint or of "
            "the architecture)",
        )
    teacher.add_argument(
        "--input-size", type=_count, metavar="N", help="side of the input in pixels"
    )
    teacher.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one a line, in the order of the outputs",
    )
    teacher.add_argument(
        "--data", metavar="DIR", help="labeled images to check the accuracy on, as for `evaluate`"
    )
    teacher.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to create (default: teachers/NAME)"
    )
    teacher.set_defaults(verb=_import_teacher)

    denoiser = kinds.add_parser(
        "denoiser",
        parents=[shared],
        help="a diffusion model with pickled weights or in a single file",
        description="Rewrite a diffusion model into a folder with safetensors and configs, for "
        "denoiser.path. Pickles are read with weights_only=True, which runs no code. No weight "
        "changes. The result is loaded once.",
    )
    hub = "hf-hub:OWNER/NAME@COMMIT"
    denoiser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"folder in diffusers format, {hub}, or a single file of Stable Diffusion 1.x",
    )
    denoiser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    denoiser.add_argument(
        "--config",
        metavar="FOLDER",
        help=f"folder (or {hub}) with the configs and the tokenizer of a single file",
    )
    denoiser.add_argument(
        "--vae", metavar="FOLDER", help=f"folder (or {hub}) of another autoencoder to put in"
    )
    denoiser.add_argument(
        "--scheduler",
        metavar="KEY=VALUE",
        type=_assignment,
        nargs="+",
        action="extend",
        default=[],
        help="values to set in scheduler_config.json, such as variance_type=learned_range",
    )
    denoiser.set_defaults(verb=_import_denoiser)


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"\w+", name):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive whole number")
    return int(text)


def _predict(options: argparse.Namespace) -> dict[str, Any] | None:
    from dmkd_fast.jobs.exchange.predict import predict

    found = predict(options.what, options.images, top=options.top)
    if options.json:
        return {"predictions": [asdict(prediction) for prediction in found]}
    for prediction in found:
        print(os.fsencode(prediction.image).decode(errors="replace"))
        for name, probability in prediction.classes.items():
            print(f"  {probability:.4f}  {name}")
    return None


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.jobs.exchange.export import export

    return export(
        options.what,
        options.to,
        out=options.out,
        data=options.data,
        classes=options.classes,
        normalize=options.normalize,
        push=options.push,
    )


def _import_teacher(options: argparse.Namespace) -> dict[str, Any]:
    shared = {"out": options.out, "data": options.data}
    if options.zero_shot is not None:
        _refuse(options, "checkpoint arch mean std input_size", "--zero-shot")
        from dmkd_fast.jobs.exchange.zero_shot import PROMPT, import_zero_shot

        prompts = options.prompt or [PROMPT]
        _require(options, "classes", "--zero-shot")
        facts = import_zero_shot(options.zero_shot, options.classes, prompts=prompts, **shared)
    else:
        _refuse(options, "prompt", "a checkpoint")
        _require(options, "checkpoint", "import teacher")
        _require(options, "arch", "a checkpoint")
        from dmkd_fast.jobs.exchange.teacher import import_teacher

        facts = import_teacher(
            options.checkpoint,
            options.arch,
            mean=options.mean,
            std=options.std,
            input_size=options.input_size,
            classes=options.classes,
            **shared,
        )
        what = f"{options.checkpoint} ({facts['weights']})"
        print(f"read {what} with weights_only, which runs no code")
    if "top1" in facts:
        print(f"top-1 {facts['top1']:.4f} on {facts['num_images']:,} images")
        if facts["top1"] <= 2 / facts["num_classes"]:
            print("that is close to chance: check --mean, --std, --input-size and --classes")
    print(f"use it as teacher: {{path: {facts['path']}}}")
    return facts


def _refuse(options: argparse.Namespace, names: str, kind: str) -> None:
    for name in names.split():
        if getattr(options, name) is not None:
            got = f"it with {kind}"
            raise invalid(_shown(name), got, "it without", "remove it")


def _require(options: argparse.Namespace, name: str, kind: str) -> None:
    if getattr(options, name) is None:
        raise UserError(f"{_shown(name)}: got none, {kind} needs it; add it, or see --help")


def _shown(name: str) -> str:
    return "CHECKPOINT" if name == "checkpoint" else f"--{name.replace('_', '-')}"


def _import_denoiser(options: argparse.Namespace) -> dict[str, Any]:
    from dmkd_fast.jobs.exchange.denoiser import import_denoiser

    facts = import_denoiser(
        options.source,
        options.out,
        config=options.config,
        vae=options.vae,
        scheduler=dict(options.scheduler),
    )
    print(f"rewrote {facts['pickles']} pickled files, read with weights_only, which runs no code")
    print(f"license: {facts['license']}; use it as denoiser: {{path: {facts['path']}}}")
    return facts
