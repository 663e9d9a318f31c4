"""The loops in docs/concepts/loss.md run and learn."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dmkd_fast import kd_loss

PAGE = (Path(__file__).parents[2] / "docs" / "concepts" / "loss.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def shown(name: str) -> object:
    """What the block of the page that defines `name` makes of it."""
    (block,) = (b for b in BLOCKS if re.search(rf"(def|class) {name}\(", b))
    space: dict[str, object] = {}
    exec(block, space)
    return space[name]


@pytest.mark.parametrize("mixup", [False, True])
def test_timm_style_loop_learns(mixup: bool) -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, 4), nn.Linear(6, 4)
    images = torch.randn(8, 6)
    loader = [(images, teacher(images).argmax(1))] * 60
    soften = lambda x, y: (x, nn.functional.one_hot(y, 4).float())  # noqa: E731
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    step = shown("train_one_epoch")
    mixup_fn = soften if mixup else None
    first = step(student, teacher, loader[:1], optimizer, mixup_fn=mixup_fn)
    last = step(student, teacher, loader, optimizer, mixup_fn=mixup_fn)
    assert last < 0.3 * first


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


def test_trainers_loss_is_over_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only its own method is tested; the real Trainer wants more packages.
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(Trainer=object))
    trainer = shown("DistillTrainer")
    torch.manual_seed(0)
    model, teacher = Language(), Language()
    self = SimpleNamespace(teacher=teacher, temperature=2.0, alpha=0.9)
    ids = torch.randint(0, 11, (3, 5))
    labels = ids.masked_fill(ids < 3, -100)
    loss = trainer.compute_loss(  # type: ignore[attr-defined]
        self, model, {"input_ids": ids, "labels": labels}, num_items_in_batch=torch.tensor(20)
    )
    rows = kd_loss(
        model(ids).logits[:, :-1],
        teacher(ids).logits[:, :-1],
        labels[:, 1:],
        temperature=2.0,
        alpha=0.9,
        reduction="none",
    )
    torch.testing.assert_close(loss, rows.sum() / 20)


def test_language_models_tokens_need_one_buffer() -> None:
    torch.manual_seed(0)
    model, teacher = nn.Embedding(11, 11), nn.Embedding(11, 11)
    ids = torch.randint(0, 11, (2, 5))
    labels = ids.masked_fill(ids < 3, -100)
    buffer = torch.empty(2, 5, 11)
    loss = shown("distill_tokens")(model, teacher(ids).detach(), ids, labels, buffer)
    expected = kd_loss(model(ids), teacher(ids).detach(), mask=labels != -100, temperature=2.0)
    torch.testing.assert_close(loss, expected.detach())
    assert model.weight.grad.abs().sum() > 0 and buffer[labels == -100].abs().sum() == 0


def test_stored_and_linear_teachers_of_the_page() -> None:
    torch.manual_seed(0)
    heads = nn.Linear(6, 11, bias=False), nn.Linear(4, 11, bias=False)
    student_hidden, teacher_hidden = torch.randn(5, 6), torch.randn(5, 4)
    student, teacher = heads[0](student_hidden), heads[1](teacher_hidden).detach()
    expected = kd_loss(student, teacher, temperature=2.0)
    loss = shown("distill_heads")(student_hidden, heads[0], teacher_hidden, heads[1])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    values, indices = teacher.topk(10)
    stored = {"values": values, "indices": indices, "logsumexp": (teacher / 2).logsumexp(-1)}
    loss = shown("distill_from_stored")(student, stored)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)  # one class is the bucket
