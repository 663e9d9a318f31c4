"""`GeneratedLoader` as the train loader of timm, Lightning, accelerate and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import CONFIG, SHORT
from torch import nn

from dmkd_fast import GeneratedLoader, kd_loss, load_classifier
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config

STEPS = 12


def loader(**changes: Any) -> GeneratedLoader:
    config = load_config(DistillConfig, CONFIG, SHORT)
    return GeneratedLoader(config, **({"steps_per_epoch": STEPS} | changes))


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 5, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


def test_timm(tmp_path: Path) -> None:
    import timm
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    from dmkd_fast.integrations.timm import FusedDistillationTask

    teacher, _ = load_classifier("embedded:fashion_mnist/weak", torch.device("cpu"))
    model = timm.create_model("lenet5_half", num_classes=10, in_chans=1)
    task = FusedDistillationTask(model, teacher, nn.CrossEntropyLoss(), temperature=4.0)
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=1e-3)
    source, losses = loader(), []
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2, warmup_epochs=0)
    for epoch in range(2):
        source.set_epoch(epoch)
        for views, target in source:
            loss = task.train()(views, target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        scheduler.step(epoch + 1)
    assert len(losses) == 2 * STEPS and sum(losses[-5:]) < sum(losses[:5])


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from dmkd_fast.integrations.lightning import DistillModule

    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "enable_checkpointing": False,
    }

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == STEPS // 2:
                trainer.save_checkpoint(tmp_path / "in_the_middle")

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == STEPS:
                trainer.save_checkpoint(tmp_path / "in_the_hook")

    def fit(epochs: int, *callbacks: Any, **more: Any) -> Any:
        model = student()
        model(torch.zeros(1, 1, 28, 28))
        trainer = lightning.Trainer(max_epochs=epochs, callbacks=[*callbacks], **options)
        trainer.fit(DistillModule(model, alpha=1.0), loader(teacher_logits=True), **more)
        return trainer

    fit(1).save_checkpoint(tmp_path / "after_an_epoch")
    whole = fit(2, Save())
    expected = whole.lightning_module.student.state_dict()
    for name in ("after_an_epoch", "in_the_middle", "in_the_hook"):
        resumed = fit(2, ckpt_path=tmp_path / name, weights_only=False)
        assert resumed.global_step == whole.global_step == 2 * STEPS, name
        for key, value in resumed.lightning_module.student.state_dict().items():
            assert torch.equal(value, expected[key]), (name, key)


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def start() -> tuple[Any, ...]:
        model, source = student(), loader(teacher_logits=True)
        model(torch.zeros(1, 1, 28, 28))
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer, source = accelerator.prepare(model, optimizer, source)
        accelerator.register_for_checkpointing(source)
        return accelerator, model, optimizer, source

    def train(accelerator: Any, model: Any, optimizer: Any, source: Any) -> list[torch.Tensor]:
        losses = []
        for views, _, teacher_logits in source:
            loss = kd_loss(model(views), teacher_logits)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return losses

    parts = start()
    assert len(train(*parts)) == STEPS
    parts[0].save_state(str(tmp_path))
    expected = train(*parts)
    again = start()
    again[0].load_state(str(tmp_path))
    again[3].set_epoch(1)
    assert torch.equal(torch.stack(train(*again)), torch.stack(expected))


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from dmkd_fast.integrations.hf import DistillTrainer, Named

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, **shape, intermediate_size=32)
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    source = loader(teacher_logits=True)
    trainer = DistillTrainer(model, arguments, train_loader=Named(source))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 * STEPS and source.step == 2 * STEPS
    assert sum(losses[-5:]) < sum(losses[:5])
