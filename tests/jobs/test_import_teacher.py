"""`dmkd import teacher`: checkpoints of common trainers become teachers with equal logits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_sets import NAMES
from torch import Tensor, nn

from dmkd_fast import cli
from dmkd_fast.classifiers.loading import build, load_classifier
from dmkd_fast.jobs.exchange.teacher import import_teacher
from dmkd_fast.runtime.errors import UserError

CPU = torch.device("cpu")
ARCH = "cifar_resnet8"
SCALE = ["--mean", "0.5", "--std", "0.25"]


def trained(arch: str = ARCH, **arguments: Any) -> nn.Module:
    torch.manual_seed(1)
    model = build(arch, **({"num_classes": 3, "in_chans": 3} | arguments)).train()
    for _ in range(3):
        model(torch.randn(8, arguments.get("in_chans", 3), 64, 64))
    return model.eval()


def prefixed(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in model.state_dict().items()}


def same_logits(folder: Path, model: nn.Module, channels: int = 3) -> None:
    again, spec = load_classifier(folder, CPU)
    images = torch.randn(4, channels, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
    assert spec.in_chans == channels


class Lit(nn.Module):
    """What a Lightning module looks like: a network among other parts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss(weight=torch.ones(3))


@pytest.mark.parametrize("kind", ["plain", "ddp", "compiled", "lightning", "torchvision", "ema"])
def test_common_layouts_become_teachers_with_equal_logits(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = trained(), build(ARCH, num_classes=3, in_chans=3)
    content: dict[str, Any] = {
        "plain": model.state_dict(),
        "ddp": {"state_dict": prefixed(model, "module."), "epoch": 3},
        "compiled": {"model_state_dict": prefixed(model, "module._orig_mod.")},
        "lightning": {
            "state_dict": Lit(model).state_dict(),
            "hyper_parameters": {"lr": 0.1},
            "pytorch-lightning_version": "2.5.0",
        },
        "torchvision": {"model": other.state_dict(), "model_ema": prefixed(model, "module.")},
        "ema": {"state_dict": other.state_dict(), "state_dict_ema": model.state_dict()},
    }[kind]
    if kind == "torchvision":
        content["model_ema"]["n_averaged"] = torch.tensor(5)
    torch.save(content, tmp_path / "last.pth")
    out = tmp_path / "teacher"
    command = ["import", "teacher", str(tmp_path / "last.pth"), "--arch", ARCH]
    assert cli.main([*command, *SCALE, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "weights_only" in said and json.loads(said.splitlines()[-1])["num_classes"] == 3
    same_logits(out, model)


def test_a_checkpoint_of_timms_own_saver_needs_no_more_than_the_name(tmp_path: Path) -> None:
    """`CheckpointSaver` is what train.py saves with; its arguments are a Namespace."""
    from timm.utils import CheckpointSaver, ModelEmaV2

    model = trained("resnet10t", in_chans=1)
    args = argparse.Namespace(
        model="resnet10t",
        mean=[0.3],
        std=[0.2],
        img_size=48,
        crop_pct=0.9,
        gp=None,
        model_kwargs={},
    )
    saver = CheckpointSaver(
        model=build("resnet10t", num_classes=3, in_chans=1),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        args=args,
        model_ema=ModelEmaV2(model),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    facts = import_teacher(tmp_path / "last.pth.tar", "resnet10t", out=tmp_path / "out")
    assert facts["weights"] == "state_dict_ema"
    assert (facts["input_size"], facts["mean"], facts["std"]) == (48, [0.3], [0.2])
    assert load_classifier(tmp_path / "out", CPU)[1].crop_pct == 0.9
    same_logits(tmp_path / "out", model, channels=1)


def test_torchvision_weights_and_class_names_and_accuracy(tmp_path: Path, folder: Path) -> None:
    model = trained("torchvision:squeezenet1_1")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    (tmp_path / "names").write_text("\n".join(NAMES))
    facts = import_teacher(
        tmp_path / "w.pth",
        "torchvision:squeezenet1_1",
        out=tmp_path / "out",
        input_size=64,
        classes=tmp_path / "names",
        data=folder,
    )
    assert facts["input_size"] == 64 and facts["num_images"] == 23 and 0 <= facts["top1"] <= 1
    assert load_classifier(tmp_path / "out", CPU)[1].label_names == NAMES
    same_logits(tmp_path / "out", model)


def test_what_is_not_plain_weights_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    model = trained()
    for name, content, message in (
        ("whole", model, "cannot be read with weights_only"),
        ("empty", {"epoch": 1}, "got keys epoch, expected tensors by name"),
        ("other", trained(num_classes=3, arch="cifar_resnet14").state_dict(), "expected"),
        ("two", prefixed(model, "a.") | prefixed(model, "b."), "under 'a.' and 'b.', expected one"),
        ("words", {"x.weight": torch.zeros(3)}, "do not tell the number of classes"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=message):
            import_teacher(tmp_path / name, ARCH, out=tmp_path / "out", mean=[0.5], std=[0.2])
    torch.save(model.state_dict(), tmp_path / "good")
    with pytest.raises(UserError, match="--mean: got none for cifar_resnet8"):
        import_teacher(tmp_path / "good", ARCH, out=tmp_path / "out")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:5000])
    with pytest.raises(UserError, match="cut"):
        import_teacher(tmp_path / "cut", ARCH, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
