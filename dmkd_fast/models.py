"""Loading and saving of classifiers: teachers and students.

Stands on floor 2; the only file that imports timm. A classifier on disk is a folder with
`config.json` (timm's hub layout) and `model.safetensors`.
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
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from dmkd_fast.weights import CONFIG, WEIGHTS, load_weights, read_json


class LeNet5(nn.Module):
    """LeNet-5 as the zero-shot distillation literature uses it: ReLU, max-pooling, 32x32 input.

    Smaller images are padded with zeros. `width=0.5` is LeNet-5-half.
    Source: LeCun et al. 1998; Nayak et al. 2019 (arXiv 1905.08114).
    """

    def __init__(self, *, num_classes: int, in_chans: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, hidden = (int(n * width) for n in (6, 16, 120, 84))
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, c1, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c1, c2, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c2, c3, 5), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(c3, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) with H, W <= 32 -> logits (B, num_classes)."""
        rows, columns = 32 - images.shape[-2], 32 - images.shape[-1]
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return self.classifier(self.features(nn.functional.pad(images, padding)).flatten(1))


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """What is needed to rebuild a classifier and to feed it."""

    architecture: str
    num_classes: int
    in_chans: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model_args: dict[str, Any] = field(default_factory=dict)
    stem: str = "own"

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
                "num_classes": self.num_classes, "interpolation": "bilinear",
            },
        }  # fmt: skip

    @staticmethod
    def from_json(values: dict[str, Any]) -> ClassifierSpec:
        """Inverse of `to_json`."""
        args = dict(values["model_args"])
        inputs = values["pretrained_cfg"]
        return ClassifierSpec(
            architecture=values["architecture"],
            num_classes=values["num_classes"],
            in_chans=args.pop("in_chans", inputs["input_size"][0]),
            input_size=inputs["input_size"][1],
            mean=tuple(inputs["mean"]),
            std=tuple(inputs["std"]),
            model_args=args,
            stem=values.get("stem", "own"),
        )


def build_classifier(spec: ClassifierSpec) -> nn.Module:
    """A new classifier with random weights.

    Raises:
        ValueError: timm knows no such architecture, or refuses the arguments.
    """
    if spec.architecture in ("lenet5", "lenet5_half"):
        width = 0.5 if spec.architecture == "lenet5_half" else 1.0
        return LeNet5(num_classes=spec.num_classes, in_chans=spec.in_chans, width=width)
    import timm

    if not timm.is_model(spec.architecture):
        close = timm.list_models(f"*{spec.architecture}*")[:5]
        raise ValueError(
            f"arch: got {spec.architecture!r}, expected lenet5, lenet5_half or a timm model"
            + (f" such as {', '.join(close)}" if close else "; see timm.list_models()")
        )
    try:
        model = timm.create_model(
            spec.architecture, pretrained=False, num_classes=spec.num_classes,
            in_chans=spec.in_chans, **spec.model_args,
        )  # fmt: skip
    except TypeError as error:
        raise ValueError(f"model_args of {spec.architecture}: {error}; change or remove") from None
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
    """Read a classifier that `save_classifier` wrote; float32, in eval mode.

    Raises:
        ValueError: A file is missing, damaged or does not fit the architecture.
    """
    config = read_json(folder / CONFIG)
    try:
        spec = ClassifierSpec.from_json(config)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{folder / CONFIG}: incomplete ({error!r}); save the model again"
        ) from None
    model = build_classifier(spec)
    load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), spec


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


def _use_small_stem(model: Any, spec: ClassifierSpec) -> None:
    """Replace a ResNet's 7x7 stride-2 first convolution by a 3x3 one."""
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or spec.stem not in ("conv3_pool", "conv3_stride2"):
        raise ValueError(
            f"stem: got {spec.stem!r} for {spec.architecture!r}, expected own, or conv3_pool or "
            "conv3_stride2 for a timm ResNet with a single first convolution; set stem=own"
        )
    stride = 2 if spec.stem == "conv3_stride2" else 1
    model.conv1 = nn.Conv2d(
        spec.in_chans, first.out_channels, 3, stride=stride, padding=1, bias=False
    )
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stride == 2:
        model.maxpool = nn.Identity()
