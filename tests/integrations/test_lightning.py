"""The fused loss in the Trainer of Lightning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import small_classifier
from torch import nn

lightning = pytest.importorskip("lightning")

from dmkd_fast.integrations.lightning import DistillModule  # noqa: E402
from dmkd_fast.runtime.errors import UserError  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return small_classifier(dropout=0.1)


def batches(count: int) -> Any:
    """Return a loader, since Lightning takes a list for several loaders."""
    views = torch.randn(count, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    made = [(batch, torch.arange(16) % 4) for batch in views]
    return torch.utils.data.DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, **changes: Any) -> Any:
    base: dict[str, Any] = {
        "default_root_dir": folder,
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return lightning.Trainer(**(base | changes))


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_an_epoch_brings_the_student_closer_to_the_teacher(tmp_path: Path, alpha: float) -> None:
    teacher = network(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = DistillModule(
        network(0), teacher, alpha=alpha, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
    )
    views = next(iter(batches(1)))[0]

    def distance() -> float:
        with torch.no_grad():
            return float((module.student.eval()(views) - teacher(views)).square().mean())

    start = distance()
    module.student.train()
    trainer(tmp_path).fit(module, batches(30))
    assert distance() < start
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_checkpoint_holds_the_student_alone_and_resumes(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.fit(DistillModule(network(0), network(1)), batches(3))
    first.save_checkpoint(path := tmp_path / "last.ckpt")
    names = torch.load(path, weights_only=False)["state_dict"]
    assert names and all(name.startswith("student.") for name in names)
    again = trainer(tmp_path, max_epochs=2)
    module = DistillModule(network(5), network(1))
    again.fit(module, batches(3), ckpt_path=path, weights_only=False)
    assert again.global_step == 6


def test_batches_may_bring_the_logits_of_a_teacher(tmp_path: Path) -> None:
    teacher, results = network(1).eval(), []
    made = [(views, target, teacher(views).detach()) for views, target in batches(5)]
    stored = torch.utils.data.DataLoader(made, batch_size=None)  # type: ignore[arg-type]
    for data, given in ((batches(5), teacher), (stored, None)):
        module = DistillModule(network(0), given, alpha=1.0)
        torch.manual_seed(3)
        trainer(tmp_path).fit(module, data)
        results.append(list(module.student.state_dict().values()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    with pytest.raises(UserError, match="teacher: got None, expected a network"):
        trainer(tmp_path).fit(DistillModule(network(0)), batches(1))
