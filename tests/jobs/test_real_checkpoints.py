"""Checkpoints that timm, torchvision and Lightning write themselves become teachers.

train.py is not in timm's wheel. What it does is written out here after
https://github.com/huggingface/pytorch-image-models/blob/aa4b5850c1543fa488abf260f18390eda46cf85d/train.py
(lines 960 to 1060). `TIMM_TRAIN=PATH` runs a copy of the script, unchanged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver
from torch import nn

from dmkd_fast import cli
from dmkd_fast.classifiers.loading import load_classifier
from dmkd_fast.jobs.exchange.teacher import import_teacher

CPU = torch.device("cpu")
# Settings of train.py that concern the network and its input, with their defaults.
DEFAULTS: dict[str, Any] = {
    "model": "resnet10t",
    "num_classes": 3,
    "in_chans": None,
    "gp": None,
    "bn_eps": None,
    "img_size": None,
    "input_size": None,
    "crop_pct": None,
    "mean": None,
    "std": None,
    "interpolation": "",
    "model_kwargs": {},
    "opt": "sgd",
    "device": "cpu",
}


def same_logits(folder: Path, model: nn.Module, *, size: int = 64) -> None:
    images = torch.randn(4, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(load_classifier(folder, CPU)[0](images), model.eval()(images))


def used(model: nn.Module) -> nn.Module:
    """Give the batch norms statistics of their own."""
    for _ in range(3):
        model.train()(torch.randn(8, 3, 64, 64))
    return model


def written_by_train_py(folder: Path, args: argparse.Namespace, *, ema: bool) -> nn.Module:
    """Write last.pth.tar as train.py does, and return the model whose weights it prefers."""
    tasks = pytest.importorskip("timm.task")
    torch.manual_seed(0)
    model = timm.create_model(
        args.model,
        num_classes=args.num_classes,
        global_pool=args.gp,
        bn_eps=args.bn_eps,
        **args.model_kwargs,
    )
    task = tasks.ClassificationTask(used(model), nn.CrossEntropyLoss(), device=CPU, verbose=False)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=0.1)
    if ema:
        task.setup_ema(decay=0.9)
        used(model)
    saver = CheckpointSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        args=args,
        amp_scaler=None,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        decreasing=False,
        max_history=10,
        task=task,
    )
    saver.save_checkpoint(0, metric=33.3)
    preferred: nn.Module = task.get_eval_model(ema=ema)
    return preferred


@pytest.mark.parametrize(
    ("changes", "ema"),
    [
        pytest.param({}, False, marks=pytest.mark.slow),
        ({}, True),
        ({"mean": [0.4], "std": [0.3], "img_size": 96, "crop_pct": 0.9, "gp": "max"}, False),
        ({"input_size": [3, 64, 64], "interpolation": "bicubic"}, False),
        ({"model_kwargs": {"channels": [8, 8, 16, 16]}}, True),
        ({"model": "mobilenetv3_small_050", "bn_eps": 0.01}, False),
    ],
)
def test_a_checkpoint_of_timms_train_py(changes: dict[str, Any], ema: bool, tmp_path: Path) -> None:
    """Logits are equal, and the input is the one that train.py validates with."""
    args = argparse.Namespace(**DEFAULTS | changes)
    model = written_by_train_py(tmp_path, args, ema=ema)
    facts = import_teacher(tmp_path / "last.pth.tar", args.model, out=tmp_path / "out")
    assert facts["weights"] == ("state_dict_ema" if ema else "state_dict")
    same_logits(tmp_path / "out", model)
    spec = load_classifier(tmp_path / "out", CPU)[1]
    theirs = resolve_data_config(vars(args), model=timm.create_model(args.model))
    got = spec.mean, spec.std, spec.input_size, spec.crop_pct, spec.interpolation
    size = theirs["input_size"][-1]
    expected = theirs["mean"], theirs["std"], size, theirs["crop_pct"], theirs["interpolation"]
    assert got == expected


@pytest.mark.slow
@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="TIMM_TRAIN names no train.py")
def test_a_checkpoint_of_an_unchanged_train_py(tmp_path: Path, folder: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "validation"):
        for path in (path for path in folder.rglob("*.*g") if path.is_file()):
            place = data / split / path.relative_to(folder).parts[0]  # timm labels by leaf folder
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / path.name)
    words = [str(data), "--model", "resnet10t", "--num-classes", "3", "--img-size", "64"]
    words += ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--model-ema"]
    words += ["--model-ema-decay", "0.5", "--no-prefetcher", "--device", "cpu", "--opt", "sgd"]
    command = [sys.executable, os.environ["TIMM_TRAIN"], *words, "--lr", "0.01"]
    command += ["--output", str(tmp_path), "--experiment", "run"]
    subprocess.run(command, check=True, cwd=tmp_path)
    file = tmp_path / "run" / "last.pth.tar"
    facts = import_teacher(file, "resnet10t", out=tmp_path / "out", data=folder)
    assert facts["input_size"] == 64 and facts["weights"] == "state_dict_ema"
    model = timm.create_model("resnet10t", num_classes=3)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model.load_state_dict(torch.load(file, weights_only=True)["state_dict_ema"])
    same_logits(tmp_path / "out", model)


@pytest.mark.parametrize("layout", ["plain", "references"])
def test_a_checkpoint_of_torchvision(layout: str, tmp_path: Path) -> None:
    """`references` is what references/classification/train.py of torchvision saves."""
    from torch.optim.swa_utils import AveragedModel
    from torchvision.models import resnet18

    model = used(resnet18(num_classes=3))
    content: dict[str, Any] = dict(model.state_dict())
    if layout == "references":
        averaged = AveragedModel(model, use_buffers=True)
        content = {
            "model": resnet18(num_classes=3).state_dict(),
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
            "lr_scheduler": {"last_epoch": 1},
            "epoch": 1,
            "args": argparse.Namespace(model="resnet18", val_crop_size=224, device="cpu"),
            "model_ema": averaged.state_dict(),
        }
    torch.save(content, tmp_path / "model.pth")
    import_teacher(tmp_path / "model.pth", "torchvision:resnet18", out=tmp_path / "out")
    same_logits(tmp_path / "out", model)
    spec = load_classifier(tmp_path / "out", CPU)[1]
    assert (spec.input_size, spec.input.short_side) == (224, 256)


@pytest.mark.slow
def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = timm.create_model("resnet10t", num_classes=3)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))

        def training_step(self, batch: Any, index: int) -> Any:
            images, labels = batch
            return self.loss(self.net(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    images = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 3)
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    module = Module(width=3)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    command = ["import", "teacher", str(tmp_path / "last.ckpt"), "--arch", "resnet10t"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    same_logits(tmp_path / "out", module.net)
