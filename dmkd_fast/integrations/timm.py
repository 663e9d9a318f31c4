"""Use the architectures and the loss of this package in timm.

    import timm
    import dmkd_fast.integrations.timm
    model = timm.create_model("local-dir:runs/NAME/student", pretrained=True)

    python -m dmkd_fast.integrations.timm train.py DIR --kd-model-name NAME   # timm's own script

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

import runpy
import sys
from collections.abc import Sequence
from typing import Any

import timm.task
import torch
from timm.models import build_model_with_cfg, register_model
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from dmkd_fast.classifiers.loading import build as build_
from dmkd_fast.classifiers.spec import SMALL_STEM
from dmkd_fast.classifiers.zero_shot import NAME as ZERO_SHOT
from dmkd_fast.loss.functional import kd_loss

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


class FusedDistillationTask(LogitDistillationTask):
    """Train as `timm.task.LogitDistillationTask` does, with the fused loss.

    The arguments and results are those of timm's task. The KD term passes over the logits once and
    computes in float32, also under autocast.
    """

    student_mean: Tensor
    student_std: Tensor

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the loss, its two terms and the student's logits (B, C).

        Args:
            input: Views (B, c, S, S), normalized for the student.
            target: What the criterion of timm takes: class ids (B,), or probabilities (B, C).
        """
        logits = self.trainable_module(input)
        with torch.no_grad():
            seen = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher_logits = self.teacher(seen)
        task_loss = self.criterion(logits, target)
        kd = kd_loss(logits, teacher_logits, temperature=self.temperature)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd
        return {"loss": loss, "output": logits, "task_loss": task_loss, "kd_loss": kd}


def use_fused_loss() -> None:
    """Make `timm.task.LogitDistillationTask` the fused one, for scripts that import it later."""
    timm.task.LogitDistillationTask = FusedDistillationTask  # type: ignore[misc]


def run_script(arguments: Sequence[str]) -> None:
    """Run a script of timm, such as its train.py, with the fused loss.

    Args:
        arguments: Path of the script and its arguments.
    """
    if not arguments:
        raise SystemExit("usage: python -m dmkd_fast.integrations.timm SCRIPT [ARGUMENTS]")
    use_fused_loss()
    sys.argv = list(arguments)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _register(name: str) -> None:
    def build(*, base: str = "" if name == SMALL_STEM else name, **arguments: Any) -> nn.Module:
        model = build_(base, **arguments)
        if not hasattr(model, "num_classes"):  # timm reads these to save and change models
            head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
            model.num_classes, model.num_features = head.out_features, head.in_features  # type: ignore[assignment]
        if not hasattr(model, "in_chans"):  # timm's distillation tasks read it
            first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
            model.in_chans = first.in_channels  # type: ignore[assignment]
        return model

    def entry(pretrained: bool = False, **arguments: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(build, name, pretrained, **arguments)
        return model

    entry.__name__ = name
    register_model(entry)


for _name in (*SMALL_NETS, ZERO_SHOT, SMALL_STEM):
    _register(_name)

if __name__ == "__main__":
    run_script(sys.argv[1:])
