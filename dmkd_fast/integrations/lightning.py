"""Train a student with the Trainer of Lightning and the fused loss.

    module = DistillModule(student, teacher)
    lightning.Trainer(max_epochs=1).fit(module, loader)

The extra [lightning] has the framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from dmkd_fast.classifiers.loading import freeze
from dmkd_fast.loss.functional import kd_loss
from dmkd_fast.runtime.errors import invalid


class DistillModule(LightningModule):
    """Train with alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE(student, target).

    A batch is (views, target), or (views, target, teacher_logits) without a teacher here. The
    target has class ids (B,) or probabilities (B, C). Checkpoints do not hold the teacher.

    Args:
        student: Network to train, views -> (B, C) logits.
        teacher: Network with the same inputs and outputs; None: each batch has `teacher_logits`.
        temperature: Softmax temperature of the KD term.
        alpha: Weight of the KD term, in (0, 1].
        optimizer: Function that makes the optimizer of the student's parameters.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        optimizer: Callable[[Iterable[nn.Parameter]], Any] = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else freeze(teacher)
        self.strict_loading = False  # A checkpoint lacks the teacher.
        self._temperature, self._alpha, self._optimizer = temperature, alpha, optimizer
        self._loader_states: list[Any] = []

    def forward(self, views: Tensor) -> Tensor:
        """Return the student's logits (B, C)."""
        logits: Tensor = self.student(views)
        return logits

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        views, target, *known = batch
        if self.teacher is not None:
            with torch.no_grad():
                known = [self.teacher(views)]
        if not known:
            raise invalid("teacher", None, "a network, or teacher_logits in each batch", "give one")
        hard = self._alpha < 1
        loss = kd_loss(
            self(views),
            known[0],
            target if hard else None,
            temperature=self._temperature,
            alpha=self._alpha if hard else None,
        )
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the student."""
        return self._optimizer(self.student.parameters())

    def train(self, mode: bool = True) -> DistillModule:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out of a checkpoint."""
        for name in [name for name in checkpoint["state_dict"] if name.startswith("teacher.")]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the states of the train loaders, which Lightning saves with each checkpoint."""
        saved = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self._loader_states = saved.get("combined_loader", [])

    def on_train_start(self) -> None:
        """Restore the train loader; Lightning does so in the middle of an epoch only."""
        states, self._loader_states = self._loader_states, []
        loader: Any = self.trainer.train_dataloader
        if len(states) == 1 and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(states[0])
