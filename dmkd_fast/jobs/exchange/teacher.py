"""Turn a PyTorch checkpoint into a folder that is safe to load: `dmkd import teacher`.

Files of timm's train.py, torchvision's references, Lightning and plain state dictionaries are read.
A checkpoint is a pickle. It is read with `torch.load(weights_only=True)`, which accepts tensors,
numbers and plain containers, and runs no code.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.classifiers import small_nets
from dmkd_fast.classifiers.loading import TORCHVISION, build, build_classifier
from dmkd_fast.classifiers.spec import ClassifierSpec
from dmkd_fast.data.class_names import read_class_names
from dmkd_fast.jobs.exchange.checkpoints import find_weights, read_checkpoint
from dmkd_fast.jobs.exchange.folders import check_new, save_teacher
from dmkd_fast.runtime.errors import UserError, invalid
from dmkd_fast.runtime.model_files import COMPILED

# Inputs of torchvision's reference training.
_TORCHVISION: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
}
Shapes = dict[str, tuple[int, ...]]


def import_teacher(
    checkpoint: str | Path,
    arch: str,
    *,
    out: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    classes: str | Path | None = None,
    data: str | Path | None = None,
) -> dict[str, Any]:
    """Read a checkpoint and save it as a folder with config.json and model.safetensors.

    The numbers of classes and channels follow from the weights. Input size, mean, std and crop
    come from the arguments, else from the settings that timm's train.py leaves in the checkpoint,
    else from the architecture's own recipe.

    Args:
        checkpoint: File of torch.save or safetensors.
        arch: Name of the architecture, as in `student.arch`.
        out: Folder to create. None: teachers/ARCH.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        input_size: Side of the input in pixels.
        classes: File with the class names, one a line, in the order of the outputs.
        data: Labeled images on which the accuracy is measured; see `open_set`.

    Returns:
        path, weights (their place in the checkpoint), num_classes, input_size, mean, std, and with
        `data` top1 and num_images.

    Raises:
        UserError: The checkpoint cannot be read safely, or does not fit the architecture.
    """
    path = Path(checkpoint)
    target = Path(out or Path("teachers") / arch.removeprefix(TORCHVISION))
    check_new(target, "--out DIR")
    content = read_checkpoint(path)
    place, weights = find_weights(path, content)
    recipe = _training_settings(content)
    given = {"mean": mean, "std": std, "input_size": input_size}
    recipe |= {name: value for name, value in given.items() if value is not None}
    spec, state, prefix = _fit(path, arch, weights, recipe)
    if classes is not None:
        names = read_class_names(Path(classes), must_exist=True)
        if len(names) != spec.num_classes:
            raise invalid(classes, f"{len(names)} names", f"{spec.num_classes}, one for each class")
        spec = ClassifierSpec(**{**vars(spec), "label_names": names})
    model = build_classifier(spec)
    model.load_state_dict(state, strict=False)  # `_compare` allows missing counters only
    return save_teacher(
        model,
        spec,
        target,
        source=path,
        weights=".".join(filter(None, (place, prefix.rstrip(".")))) or "the whole file",
        data=data,
        classes=classes,
    )


def _training_settings(content: Any) -> dict[str, Any]:
    """Return the settings of the input that timm's train.py leaves in a checkpoint."""
    args = content.get("args") if isinstance(content, Mapping) else None
    values = vars(args) if isinstance(args, argparse.Namespace) else {}
    found = {k: values[k] for k in ("mean", "std", "crop_pct", "interpolation") if values.get(k)}
    size = values.get("input_size") or values.get("img_size")
    if size:
        found["input_size"] = size if isinstance(size, int) else size[-1]
    extra = dict(values.get("model_kwargs") or {})
    names = {"gp": "global_pool", "bn_eps": "bn_eps"}  # those that change the logits
    extra |= {ours: values[theirs] for theirs, ours in names.items() if values.get(theirs)}
    return found | ({"model_args": extra} if extra else {})


def _fit(
    path: Path, arch: str, weights: dict[str, Tensor], recipe: dict[str, Any]
) -> tuple[ClassifierSpec, dict[str, Tensor], str]:
    """Match the weights to the architecture.

    Returns:
        The spec, the weights under the architecture's own names, and the prefix that they had.
    """
    args = recipe.get("model_args", {})
    channels = 3 if arch.startswith(TORCHVISION) else 1
    few, many = _shapes(arch, 7, channels, args), _shapes(arch, 11, 3, args)
    prefix, state = _without_prefix(path, weights, few)
    num_classes = _number(path, state, few, many, axis=0, sizes=(7, 11), what="classes")
    in_chans = 3
    if channels == 1:
        in_chans = _number(path, state, few, many, axis=1, sizes=(1, 3), what="channels")
    with torch.device("meta"):
        outline = build(arch, num_classes=num_classes, in_chans=in_chans, **args)
    _compare(path, arch, state, {k: tuple(v.shape) for k, v in outline.state_dict().items()})
    spec = _spec(arch, num_classes, in_chans, getattr(outline, "pretrained_cfg", None), recipe)
    return spec, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, prefix


def _shapes(arch: str, num_classes: int, in_chans: int, args: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        model = build(arch, num_classes=num_classes, in_chans=in_chans, **args)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _without_prefix(
    path: Path, weights: dict[str, Tensor], expected: Shapes
) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix under which most of the expected names are, and the weights without it.

    Weights outside the prefix belong to other parts, such as a loss or metrics, and are left out.
    """
    cleaned = {name.replace(COMPILED, ""): value for name, value in weights.items()}
    places = {""} | {n[: i + 1] for n in cleaned for i, sign in enumerate(n) if sign == "."}
    found = {p: sum(p + name in cleaned for name in expected) for p in places}
    most = max(found.values())
    best = sorted((p for p in places if found[p] == most), key=lambda p: (len(p), p))
    if most and len(best) > 1:
        what = f"the same network under {best[0]!r} and {best[1]!r}"
        raise invalid(path, what, "one", "save only one of them")
    prefix = best[0]
    return prefix, {n.removeprefix(prefix): v for n, v in cleaned.items() if n.startswith(prefix)}


def _number(
    path: Path,
    state: dict[str, Tensor],
    few: Shapes,
    many: Shapes,
    *,
    axis: int,
    sizes: tuple[int, int],
    what: str,
) -> int:
    """Read a number of classes or channels off the weights whose shape depends on it."""
    for name in few:
        first, second = few[name], many[name]
        depends = len(first) > axis and (first[axis], second[axis]) == sizes
        if depends and name in state and state[name].dim() > axis:
            return state[name].shape[axis]
    such = f"such as {next(iter(state))}" if state else "none"
    raise UserError(
        f"{path}: got weights ({such}) that do not tell the number of {what}, expected those of "
        "--arch; name the architecture that was trained"
    )


def _compare(path: Path, arch: str, state: dict[str, Tensor], expected: Shapes) -> None:
    for name in sorted(expected.keys() | state.keys()):
        got = tuple(state[name].shape) if name in state else "nothing"
        want = expected.get(name, "nothing")
        if got != want and not (got == "nothing" and name.endswith("num_batches_tracked")):
            fix = f"the checkpoint is not of {arch}, or of it with other arguments"
            raise invalid(f"{path}: {name[:120]}", got, str(want), fix)


def _spec(
    arch: str, num_classes: int, in_chans: int, known: Any, recipe: dict[str, Any]
) -> ClassifierSpec:
    """Put the spec together: given values first, then the architecture's own recipe."""
    own: dict[str, Any] = dict(_TORCHVISION) if arch.startswith(TORCHVISION) else dict(known or {})
    if arch.startswith(small_nets.PREFIXES):
        own = {"input_size": (in_chans, *[28 if arch.startswith("lenet5") else 32] * 2)}
    values = own | recipe
    for name in ("mean", "std"):
        if values.get(name) is None:
            raise UserError(
                f"--{name}: got none for {arch}, expected the one of its training; add "
                f"--{name} with one number per channel, of pixels in [0, 1]"
            )
    mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
    if in_chans == 1 and len(mean) == len(std) == 3:  # timm's recipes have three for gray too
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    size = values["input_size"]
    spec = ClassifierSpec(
        architecture=arch,
        num_classes=num_classes,
        in_chans=in_chans,
        input_size=size if isinstance(size, int) else size[-1],
        mean=mean * in_chans if len(mean) == 1 else mean,
        std=std * in_chans if len(std) == 1 else std,
        crop_pct=values.get("crop_pct") or 1.0,
        interpolation=values.get("interpolation") or "bilinear",
        crop_mode=values.get("crop_mode") or "center",
        model_args=recipe.get("model_args", {}),
    )
    return ClassifierSpec.from_json(spec.to_json())  # checks every value
