"""The fused loss in the Trainer of transformers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from dmkd_fast import kd_loss  # noqa: E402
from dmkd_fast.integrations.hf import DistillTrainer, Named  # noqa: E402
from dmkd_fast.runtime.errors import UserError  # noqa: E402

NUM_IMAGES = 64


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config)


def images() -> list[dict[str, Tensor]]:
    pixels = torch.randn(NUM_IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": p, "labels": torch.tensor(i % 4)} for i, p in enumerate(pixels)]


def arguments(folder: Path, **changes: Any) -> Any:
    base: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    return transformers.TrainingArguments(**(base | changes))


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_an_epoch_lowers_the_loss_and_leaves_the_teacher(tmp_path: Path) -> None:
    teacher = vit(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = DistillTrainer(
        vit(0),
        arguments(tmp_path, num_train_epochs=4),
        train_dataset=images(),
        eval_dataset=images(),
        teacher=teacher,
        alpha=0.5,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert len(losses(trainer)) == 4 * NUM_IMAGES // 8
    assert trainer.evaluate()["eval_loss"] < start
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_accumulation_changes_no_step(tmp_path: Path, alpha: float) -> None:
    results = []
    for size, accumulated in ((16, 1), (4, 4)):
        changes = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }
        trainer = DistillTrainer(
            student := vit(0),
            arguments(tmp_path, **changes),
            train_dataset=images(),
            teacher=vit(1),
            alpha=alpha,
        )
        trainer.train()
        results.append([*student.state_dict().values(), torch.tensor(losses(trainer))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def gpt(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 11}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


class Adapted(nn.Module):
    """A model in the place where PEFT's has it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, input_ids: Tensor) -> Any:
        return self.base(input_ids=input_ids)


@pytest.mark.parametrize("wrap", [Adapted, torch.compile])
def test_labels_of_wrapped_language_models_are_shifted_too(tmp_path: Path, wrap: Any) -> None:
    tokens = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(2))
    plain, found = gpt(0).eval(), []
    for student in (plain, wrap(plain)):
        trainer = DistillTrainer(student, arguments(tmp_path), teacher=gpt(1), alpha=0.25)
        # Called with the plain model, as compiling it would take long.
        found.append(trainer.compute_loss(plain, {"input_ids": tokens, "labels": tokens}))
    torch.testing.assert_close(found[1], found[0])


def test_labels_of_language_models_are_shifted_and_padding_does_not_count(tmp_path: Path) -> None:
    tokens = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[:, 5:] = -100
    student, teacher = gpt(0).eval(), gpt(1).eval()
    trainer = DistillTrainer(
        student, arguments(tmp_path), teacher=teacher, temperature=2.0, alpha=0.25
    )
    found = trainer.compute_loss(student, {"input_ids": tokens, "labels": labels})
    with torch.no_grad():
        s, t = (m(input_ids=tokens).logits[:, :4].reshape(-1, 11) for m in (student, teacher))
    kd = nn.functional.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    ce = nn.functional.cross_entropy(s, labels[:, 1:5].reshape(-1))
    torch.testing.assert_close(found, 0.25 * 4 * kd + 0.75 * ce)


def test_batches_may_bring_the_logits_of_a_teacher(tmp_path: Path) -> None:
    teacher = vit(1).eval()
    batches = []
    for first in range(0, NUM_IMAGES, 16):
        rows = images()[first : first + 16]
        pixels, labels = (torch.stack([row[k] for row in rows]) for k in rows[0])
        batches.append((pixels, labels, teacher(pixels).logits.detach()))
    stored = DistillTrainer(vit(0), arguments(tmp_path), train_loader=Named(batches), alpha=1.0)
    stored.train()
    live = DistillTrainer(
        vit(0),
        arguments(tmp_path),
        train_loader=Named([batch[:2] for batch in batches]),
        teacher=teacher,
        alpha=1.0,
    )
    live.train()
    assert losses(stored) == losses(live)
    without = DistillTrainer(
        vit(0), arguments(tmp_path), train_loader=Named([batch[:2] for batch in batches])
    )
    with pytest.raises(UserError, match="teacher: got None, expected a network"):
        without.train()


def test_probabilities_as_labels_are_divided_by_the_number_of_images(tmp_path: Path) -> None:
    """The Trainer counts the numbers in `labels`: 8 class ids, or 8 x 4 probabilities."""
    student = vit(0).eval()
    trainer = DistillTrainer(student, arguments(tmp_path), teacher=vit(1), alpha=0.5)
    rows = images()[:8]
    pixels, ids = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels"))
    found = []
    for labels in (ids, nn.functional.one_hot(ids, 4).float()):
        inputs = {"pixel_values": pixels, "labels": labels}
        counted = torch.tensor(labels.numel())
        found.append(trainer.compute_loss(student, inputs, num_items_in_batch=counted))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def batch_of_images(rows: int) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in images()[:rows]]) for name in images()[0]}


def test_the_sum_over_processes_makes_up_for_their_mean(tmp_path: Path) -> None:
    student, inputs = vit(0).eval(), batch_of_images(8)
    trainer = DistillTrainer(student, arguments(tmp_path), teacher=vit(1), alpha=0.5)
    trainer.args.average_tokens_across_devices = True
    counted, found = torch.tensor(16), []
    for processes in (1, 2):
        trainer.accelerator = SimpleNamespace(num_processes=processes)
        found.append(trainer.compute_loss(student, inputs, num_items_in_batch=counted))
    torch.testing.assert_close(found[1], 2 * found[0])
    mean = trainer.compute_loss(student, inputs)  # evaluation may not know the number
    torch.testing.assert_close(mean, found[1])


def test_a_student_that_returns_its_logits_alone_is_evaluated_on_all_rows(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = vit(0)

        def forward(self, pixel_values: Tensor) -> Tensor:
            logits: Tensor = self.inside(pixel_values=pixel_values).logits
            return logits

    student, inputs = Plain().eval(), batch_of_images(8)
    settings = arguments(tmp_path, label_names=["labels"])
    trainer = DistillTrainer(student, settings, teacher=vit(1), alpha=0.5)
    loss, logits, labels = trainer.prediction_step(student, inputs, prediction_loss_only=False)
    expected, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    torch.testing.assert_close(loss, expected.detach())
    assert torch.equal(labels, inputs["labels"]) and torch.equal(logits, outputs["logits"])
    assert torch.equal(logits, student(inputs["pixel_values"]))


def test_label_smoothing_of_the_arguments_is_that_of_the_loss(tmp_path: Path) -> None:
    student, teacher, inputs = vit(0).eval(), vit(1), batch_of_images(8)
    settings = arguments(tmp_path, label_smoothing_factor=0.2)
    trainer = DistillTrainer(student, settings, teacher=teacher, alpha=0.5)
    found = trainer.compute_loss(student, inputs)
    with torch.no_grad():
        logits, taught = (m(inputs["pixel_values"]).logits for m in (student, teacher))
    named = {"temperature": 4.0, "alpha": 0.5, "label_smoothing": 0.2}
    torch.testing.assert_close(found.detach(), kd_loss(logits, taught, inputs["labels"], **named))
    with pytest.raises(UserError, match=r"label_smoothing_factor: got 0\.2, expected 0 with alpha"):
        DistillTrainer(student, settings, teacher=teacher, alpha=1.0)


def test_named_batches_can_be_copied_and_pickled() -> None:
    named = Named([(torch.zeros(2), torch.ones(2))])
    for again in (copy.copy(named), pickle.loads(pickle.dumps(named))):
        (batch,) = again
        assert list(batch) == ["pixel_values", "labels"] and len(again) == 1
