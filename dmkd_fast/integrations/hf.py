"""Train a student with the Trainer of transformers and the fused loss.

    trainer = DistillTrainer(student, arguments, train_dataset=data, teacher=teacher)
    trainer.train()

The extra [hf] has transformers and accelerate, which its Trainer needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dmkd_fast.classifiers.loading import freeze
from dmkd_fast.loss.functional import kd_loss
from dmkd_fast.runtime.errors import invalid


class Named:
    """Name the tensors of each batch, as the Trainer passes them to the model by name.

    Args:
        loader: Loader of tuples, such as `GeneratedLoader`.
        names: Names of the tensors, in order.
    """

    def __init__(
        self,
        loader: Iterable[tuple[Tensor, ...]],
        names: tuple[str, ...] = ("pixel_values", "labels", "teacher_logits"),
    ) -> None:
        self._loader, self._names = loader, names

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._loader:
            yield dict(zip(self._names, batch, strict=False))

    def __len__(self) -> int:
        assert isinstance(self._loader, Sized)
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # `_loader` is not there yet while this is unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)  # set_epoch, state_dict and the like


class DistillTrainer(Trainer):
    """Train with alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE(student, labels).

    Causal language models get the labels of the next token, others the labels unchanged. Positions
    with the label -100 do not count. The sum is divided by the number of labels of all accumulated
    batches and processes, as the Trainer does with its own losses.

    Args:
        arguments: Arguments of `transformers.Trainer`.
        teacher: Network with the student's inputs and logits; None: each batch has
            `teacher_logits`.
        temperature: Softmax temperature of the KD term.
        alpha: Weight of the KD term, in (0, 1].
        train_loader: Batches to train on, in place of a loader of `train_dataset`.
        options: Named arguments of `transformers.Trainer`.

    Raises:
        UserError: The process would train on several GPUs, or labels are to be smoothed without a
            cross-entropy.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: nn.Module | None = None,
        temperature: float = 4.0,
        alpha: float = 0.9,
        train_loader: Iterable[dict[str, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        if train_loader is not None:
            options.setdefault("train_dataset", train_loader)  # The Trainer reads its length.
        super().__init__(*arguments, **options)
        if self.args.n_gpu > 1:
            fix = "start one process for each GPU with torchrun or accelerate launch"
            raise invalid("args.n_gpu", self.args.n_gpu, "at most 1", fix)
        if (smoothing := self.args.label_smoothing_factor) and alpha == 1:
            fix = "choose alpha below 1"
            raise invalid("args.label_smoothing_factor", smoothing, "0 with alpha=1", fix)
        self._teacher = None if teacher is None else freeze(teacher).to(self.args.device)
        self._temperature, self._alpha, self._loader = temperature, alpha, train_loader
        # The Trainer asks `loss_type`, which GPT-2 and others do not set.
        if type(_unwrapped(self.model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self._loss_shifts_labels = True
        # The Trainer then counts the labels, and leaves the mean to `compute_loss`.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> Any:
        """Return `train_loader`, or the Trainer's own loader."""
        return self._loader if self._loader is not None else super().get_train_dataloader()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, and the model's outputs if `return_outputs` is set.

        Outputs that are the logits alone come as {"logits": ...}: the Trainer takes the first item
        of anything but a dict for a loss.
        """
        inputs = dict(inputs)
        labels, known = inputs.pop("labels"), inputs.pop("teacher_logits", None)
        outputs = model(**inputs)
        logits, taught = _logits(outputs), known
        if self._teacher is not None:
            with torch.no_grad():
                taught = _logits(self._teacher(**inputs))
        if taught is None:
            raise invalid("teacher", None, "a network, or teacher_logits in each batch", "give one")
        if getattr(self, "_loss_shifts_labels", False):
            # Shifted labels leave the logits in place; the last position has no label.
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        hard = self._alpha < 1
        num_items: Tensor | float | None = num_items_in_batch
        if num_items is not None and labels.is_floating_point():
            num_items = num_items / labels.shape[-1]  # The Trainer has counted all numbers.
        loss = kd_loss(
            logits,
            taught,
            labels if hard else None,
            temperature=self._temperature,
            alpha=self._alpha if hard else None,
            mask=None if hard or labels.is_floating_point() else labels != -100,
            num_items=num_items,
            label_smoothing=self.args.label_smoothing_factor if hard else 0.0,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # Gradients are averaged over processes.
        if isinstance(outputs, Tensor):
            outputs = {"logits": outputs}
        return (loss, outputs) if return_outputs else loss


def _unwrapped(model: Any) -> nn.Module:
    """Return the model inside of those of torch.compile and PEFT."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    found: nn.Module = model if base is None else base()
    return found


def _logits(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return found
