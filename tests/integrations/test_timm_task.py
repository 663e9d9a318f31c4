"""The fused loss in timm's distillation task, and in scripts of timm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import timm.task
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from dmkd_fast.integrations.timm import FusedDistillationTask, run_script

OURS = FusedDistillationTask


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cifar_resnet8", num_classes=4, in_chans=3)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    images = torch.rand(count, 16, 3, 16, 16, generator=random)
    return [(batch, (batch.mean((1, 2, 3)) * 997 % 4).long()) for batch in images]


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Return timm's own task, and restore it and the command line after the test."""
    own: type[nn.Module] = timm.task.LogitDistillationTask
    monkeypatch.setattr(timm.task, "LogitDistillationTask", own)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return own


NORMALIZED = {"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.4, 0.5)}  # unlike the student's


@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.1}, {"distill_loss_weight": 2.0}])
@pytest.mark.parametrize("changes", [{}, NORMALIZED], ids=["same inputs", "teacher's own inputs"])
def test_loss_and_gradients_are_those_of_timm(
    original: type[nn.Module], changes: dict, weights: dict[str, float]
) -> None:
    (images, target), results = batches(1)[0], []
    for kind in (original, OURS):
        student, teacher = network(0), network(1)
        teacher.pretrained_cfg = {**teacher.pretrained_cfg, **changes}
        task = kind(student, teacher, nn.CrossEntropyLoss(), temperature=4.0, **weights)
        found = task.train()(images, target)
        found["loss"].backward()
        grads = [p.grad for p in student.parameters()]
        assert all(p.grad is None for p in task.teacher.parameters())
        results.append([found["loss"], found["task_loss"], found["kd_loss"], *grads])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_epoch_with_the_optimizer_of_timm_lowers_the_loss() -> None:
    task = FusedDistillationTask(network(0), network(1), nn.CrossEntropyLoss(), temperature=4.0)
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=3e-3)
    seen = batches(20)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(task.eval()(*batch)["loss"]) for batch in seen[:5])

    before = loss()
    for images, target in seen:
        found = task.train()(images, target)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert loss() < 0.95 * before


def test_a_script_of_timm_gets_the_fused_task_and_its_own_arguments(
    original: type[nn.Module], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom timm.task import LogitDistillationTask\n"
        "assert __name__ == '__main__'\n"
        "Path(sys.argv[1]).write_text(' '.join([LogitDistillationTask.__name__, *sys.argv[2:]]))\n"
    )
    out = tmp_path / "out"
    run_script([str(script), str(out), "--kd-temperature", "2"])
    assert out.read_text() == "FusedDistillationTask --kd-temperature 2"
    with pytest.raises(SystemExit, match="SCRIPT"):
        run_script([])
