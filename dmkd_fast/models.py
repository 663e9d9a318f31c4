"""Loading and saving of classifiers: teachers and students.

Stands on floor 2; the only file that imports timm or torchvision. A classifier on disk is a folder
with `config.json` (timm's hub layout) and `model.safetensors`, so what timm puts on the Hub is read
as it is. Architectures: `small_nets.py`, `torchvision:NAME`, any other name is timm's.
"""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.fx.experimental.optimization import fuse

from dmkd_fast import small_nets
from dmkd_fast.inputs import InputSpec
from dmkd_fast.weights import CONFIG, WEIGHTS, load_weights, read_json, read_licence

TORCHVISION = "torchvision:"


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """What is needed to rebuild a classifier and to feed it."""

    architecture: str
    num_classes: int
    in_chans: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    model_args: dict[str, Any] = field(default_factory=dict)
    stem: str = "own"

    @property
    def input(self) -> InputSpec:
        """How the classifier wants its images."""
        return InputSpec(
            size=self.input_size, mean=self.mean, std=self.std, crop_pct=self.crop_pct,
            interpolation=self.interpolation,  # type: ignore[arg-type]  # InputSpec checks it
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The spec in timm's hub layout (`local-dir:` reads it where the stem is its own)."""
        shape = [self.in_chans, self.input_size, self.input_size]
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "model_args": {"in_chans": self.in_chans, **self.model_args},
            "stem": self.stem,
            "pretrained_cfg": {
                "input_size": shape, "mean": list(self.mean), "std": list(self.std),
                "num_classes": self.num_classes, "interpolation": self.interpolation,
                "crop_pct": self.crop_pct,
            },
        }  # fmt: skip

    @staticmethod
    def from_json(values: dict[str, Any]) -> ClassifierSpec:
        """Inverse of `to_json`; takes what timm writes as well."""
        args = dict(values.get("model_args", {}))
        args.pop("num_classes", None)  # timm states it twice
        inputs = values.get("pretrained_cfg", values)  # timm's first layout had one level
        in_chans = args.pop("in_chans", inputs["input_size"][0])
        mean, std = tuple(inputs["mean"]), tuple(inputs["std"])
        if in_chans == 1 and len(mean) == 3:  # timm states colour statistics for grey inputs too
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        return ClassifierSpec(
            architecture=values["architecture"],
            num_classes=values["num_classes"],
            in_chans=in_chans,
            input_size=inputs["input_size"][1],
            mean=mean,
            std=std,
            # What timm assumes where a config is silent; our own files without it mean no cut.
            crop_pct=inputs.get("crop_pct", 1.0 if "stem" in values else 0.875),
            interpolation=inputs.get("interpolation", "bilinear"),
            model_args=args,
            stem=values.get("stem", "own"),
        )


def build_classifier(spec: ClassifierSpec) -> nn.Module:
    """A new classifier with random weights.

    Raises:
        ValueError: There is no such architecture, or it refuses the arguments.
    """
    name = spec.architecture
    try:
        model = small_nets.build(name, num_classes=spec.num_classes, in_chans=spec.in_chans)
        if model is not None:
            if spec.model_args:
                raise TypeError(f"takes none, got {', '.join(spec.model_args)}")
        elif name.startswith(TORCHVISION):
            model = _torchvision(spec)
        else:
            model = _timm(spec)
    except TypeError as error:
        raise ValueError(f"model_args of {name}: {error}; change or remove") from None
    if spec.stem != "own":
        _use_small_stem(model, spec)
    return model


def save_classifier(model: nn.Module, spec: ClassifierSpec, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder."""
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(spec.to_json(), indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path, device: torch.device) -> tuple[nn.Module, ClassifierSpec]:
    """Read a classifier that `save_classifier` or timm wrote; float32, in eval mode.

    Raises:
        ValueError: A file is missing, damaged or does not fit the architecture.
    """
    config = read_json(folder / CONFIG)
    try:
        spec = ClassifierSpec.from_json(config)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG}: incomplete ({error!r}); save the model again"
        ) from None
    model = build_classifier(spec)
    load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), spec


def classifier_licence(folder: Path) -> str:
    """The licence that a classifier's model card or config states, or "unknown"."""
    stated = read_json(folder / CONFIG).get("pretrained_cfg", {}).get("license")
    return str(stated) if stated else read_licence(folder)


def hub_repository(architecture: str) -> str:
    """The Hub repository with the pretrained weights of a timm name: `OWNER/NAME`.

    Raises:
        ValueError: timm knows no such name, or no weights of it on the Hub.
    """
    import timm

    if not timm.is_model(architecture):
        _refuse_name(architecture)
    try:
        config = timm.get_pretrained_cfg(architecture)
    except (RuntimeError, ValueError):  # no such tag
        config = None
    if config is None or not config.hf_hub_id:
        known = timm.list_pretrained(f"{architecture.split('.')[0]}*")[:5]
        raise ValueError(
            f"arch: got {architecture!r} with pretrained=true, expected a timm name with weights "
            f"on the Hub{' such as ' + ', '.join(known) if known else ''}; set path instead"
        )
    return str(config.hf_hub_id)


def load_torchvision(
    architecture: str, device: torch.device
) -> tuple[nn.Module, ClassifierSpec, str]:
    """torchvision's own default weights of `torchvision:NAME`; downloaded once, hash-checked.

    Returns:
        The model in eval mode, its spec, and the name of the weights.

    Raises:
        ValueError: There is no such model, no weights of it, or no network.
    """
    from torchvision.models import get_model_weights

    name = architecture.removeprefix(TORCHVISION)
    _check_torchvision_name(name)
    weights = get_model_weights(name).DEFAULT
    recipe = weights.transforms()
    spec = ClassifierSpec(
        architecture=architecture, num_classes=len(weights.meta["categories"]), in_chans=3,
        input_size=recipe.crop_size[0], mean=tuple(recipe.mean), std=tuple(recipe.std),
        crop_pct=min(1.0, recipe.crop_size[0] / recipe.resize_size[0]),
        interpolation=recipe.interpolation.value,
        # These two were trained on inputs scaled another way, and convert them.
        model_args={"transform_input": True} if name in ("googlenet", "inception_v3") else {},
    )  # fmt: skip
    model = build_classifier(spec)
    try:
        # A .pth file: weights_only refuses everything in it but tensors.
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, or whatever the reader says of a damaged file
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(
            f"{architecture}: cannot have {weights.url} ({reason}); check the network and torch's "
            "cache, or set path to weights in safetensors"
        ) from None
    kept = model.state_dict().keys()
    state = {k: v for k, v in state.items() if k in kept or not k.lower().startswith("aux")}
    model.load_state_dict(state)
    return model.to(device).eval(), spec, str(weights)


def for_inference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy that gives the same logits faster; the model itself is left alone.

    Weights are cast once (autocast would cast frozen ones on every call) and batch norms are folded
    into the convolutions before them where the model can be traced: 27 ms -> 12 ms for the embedded
    strong teacher, 64 views, one CPU thread, bfloat16.
    """
    copied = freeze(copy.deepcopy(model))
    with contextlib.suppress(Exception):  # tracing fails in many ways; the copy is then unfolded
        copied = fuse(copied)
    return copied.to(dtype).to(memory_format=torch.channels_last)


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, and no parameter asks for a gradient."""
    return model.eval().requires_grad_(False)


def _timm(spec: ClassifierSpec) -> nn.Module:
    import timm

    if not timm.is_model(spec.architecture):
        _refuse_name(spec.architecture)
    return timm.create_model(
        spec.architecture, pretrained=False, num_classes=spec.num_classes, in_chans=spec.in_chans,
        **spec.model_args,
    )  # fmt: skip


def _torchvision(spec: ClassifierSpec) -> nn.Module:
    from torchvision.models import get_model

    name = spec.architecture.removeprefix(TORCHVISION)
    _check_torchvision_name(name)
    if spec.in_chans != 3:
        raise ValueError(
            f"{spec.architecture}: got images with {spec.in_chans} channel(s), expected 3, as "
            "torchvision's models take colour only; use a timm model"
        )
    args = dict(spec.model_args)
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads return more than logits
        args = {"aux_logits": False, "init_weights": True} | args
    model: nn.Module = get_model(name, weights=None, num_classes=spec.num_classes, **args)
    return model


def _check_torchvision_name(name: str) -> None:
    import difflib

    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"arch: got {TORCHVISION}{name}, expected a classification model of torchvision "
            + (f"such as {', '.join(close)}" if close else "(see torchvision.models.list_models())")
        )


def _refuse_name(architecture: str) -> None:
    import timm

    close = timm.list_models(f"*{architecture}*")[:5]
    raise ValueError(
        f"arch: got {architecture!r}, expected lenet5, lenet5_half, cifar_..., torchvision:NAME or "
        "a timm model" + (f" such as {', '.join(close)}" if close else "; see timm.list_models()")
    )


def _use_small_stem(model: Any, spec: ClassifierSpec) -> None:
    """Replace a ResNet's 7x7 stride-2 first convolution by a 3x3 one."""
    first = getattr(model, "conv1", None)
    stems = ("conv3", "conv3_pool", "conv3_stride2")
    if not isinstance(first, nn.Conv2d) or spec.stem not in stems:
        raise ValueError(
            f"stem: got {spec.stem!r} for {spec.architecture!r}, expected own, or "
            f"{', '.join(stems)} for a ResNet with a single first convolution; set stem=own"
        )
    stride = 2 if spec.stem == "conv3_stride2" else 1
    model.conv1 = nn.Conv2d(
        spec.in_chans, first.out_channels, 3, stride=stride, padding=1, bias=False
    )
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if spec.stem != "conv3_pool":
        model.maxpool = nn.Identity()
