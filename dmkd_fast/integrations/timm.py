"""Register the architectures of this package with timm, so that timm can load such students.

    import timm
    import dmkd_fast.integrations.timm
    model = timm.create_model("local-dir:runs/NAME/student", pretrained=True)

Students with an architecture of timm need no import of this module. Registered are:

    `lenet5`, `lenet5_half`
    `cifar_resnetD` up to depth 110, `cifar_resnetDx4` up to depth 56
    `cifar_wrnD_K` up to depth 40 and width 10
    `cifar_vgg8`, `cifar_vgg11`, `cifar_vgg13`
    `clip_zero_shot`
    `small_stem_resnet`, any ResNet of timm (`base=`) with a small stem (`stem=`, as in
        `ClassifierConfig.stem`)
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from dmkd_fast.classifiers.loading import build as build_
from dmkd_fast.classifiers.spec import SMALL_STEM
from dmkd_fast.classifiers.zero_shot import NAME as ZERO_SHOT

SMALL_NETS = (
    "lenet5",
    "lenet5_half",
    "cifar_vgg8",
    "cifar_vgg11",
    "cifar_vgg13",
    *(f"cifar_resnet{depth}" for depth in range(8, 111, 6)),
    *(f"cifar_resnet{depth}x4" for depth in range(8, 57, 6)),
    *(f"cifar_wrn{depth}_{width}" for depth in range(10, 41, 6) for width in range(1, 11)),
)


def _register(name: str) -> None:
    def build(*, base: str = "" if name == SMALL_STEM else name, **arguments: Any) -> nn.Module:
        model = build_(base, **arguments)
        if not hasattr(model, "num_classes"):  # timm reads these to save and change models
            head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
            model.num_classes, model.num_features = head.out_features, head.in_features  # type: ignore[assignment]
        return model

    def entry(pretrained: bool = False, **arguments: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(build, name, pretrained, **arguments)
        return model

    entry.__name__ = name
    register_model(entry)


for _name in (*SMALL_NETS, ZERO_SHOT, SMALL_STEM):
    _register(_name)
