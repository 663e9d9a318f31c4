"""The student and all that changes with it in a step: gradients, optimizer, average, guard.

That is decided on the device: nothing here waits for it. The loss enters
the gradient, and ranks that average their gradients then decide alike.
B views that go through the student together, C classes.
Source: Micikevicius et al., "Mixed precision training" (arXiv 1710.03740), on loss scaling.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dmkd_fast.loss.functional import kd_loss_and_grad
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import NotFiniteError
from dmkd_fast.training.ema import Buffers, WeightEMA
from dmkd_fast.training.optim import build_optimizer, set_lr
from dmkd_fast.training.schedule import Schedule
from dmkd_fast.views.spec import check_logits

# torch.amp.GradScaler's: float16 gradients are kept above its smallest numbers by a factor that is
# halved by a step that overflows, and doubled after so many that did not.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000


class StudentTrainer:
    """Trains a student on logits of a teacher.

    Args:
        student: (B, c, S, S) views -> (B, C) logits; trained in place.
        schedule: Optimizer, averaging, clipping, and how many skipped steps are too many.
        temperature: Of the KD term.
        alpha: Its share, in (0, 1]; the rest is cross-entropy with the targets.
        dtype: Autocast dtype; float32 turns autocast off, float16 turns loss scaling on.
        compile: torch.compile the student.
        ranks: This process among those that train the same student, each on its part.

    Raises:
        ValueError: `alpha` is out of range, or the batch does not fall into equal parts.

    Attributes:
        network: What is called with views: the student, or what is wrapped around it.
        part_size: Views that go through it together.
        optimizer, average: Its optimizer and averaged weights.
    """

    def __init__(
        self, student: nn.Module, *, schedule: Schedule, temperature: float = 4.0,
        alpha: float = 1.0, dtype: torch.dtype = torch.float32, compile: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        checks.number("temperature", temperature, low=0.01, high=1000)
        if not 0 < alpha <= 1:
            raise ValueError(
                f"alpha: got {alpha}, expected a share above 0 and at most 1; with 0 the teacher "
                "would be ignored"
            )
        self.student, self.schedule = student.train(), schedule
        self._temperature, self._alpha = temperature, alpha
        self._batch = ranks.share("batch_size", schedule.batch_size, unit=schedule.accumulate)
        self.part_size = self._batch // schedule.accumulate
        fast: Any = torch.compile(student, dynamic=False) if compile else student
        if not any(p.requires_grad for p in student.parameters()):
            raise ValueError(
                f"student: got a {type(student).__name__} without parameters that require a "
                "gradient, expected some to train; give another network or unfreeze it"
            )
        device = next(student.parameters()).device
        self.network = ranks.parallel(fast, device)  # From here on with rank 0's weights.
        self.optimizer = build_optimizer(
            student, name=schedule.name, lr=schedule.lr, momentum=schedule.momentum,
            nesterov=schedule.nesterov, weight_decay=schedule.weight_decay,
        )  # fmt: skip
        self.average = WeightEMA(student, decay=schedule.ema_decay)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        self._buffers = Buffers(student)
        self._before_warm_up: list[Tensor] | None = None
        self._buffers_before: list[Tensor] | None = None  # not None: within a step
        self._updates = False  # within the part of a step that changes weights
        self._parts_left = 0
        # Fused optimizers leave weights, moments and counts as they are where this is not 0.
        self._found = torch.zeros((), device=device)
        self.optimizer.found_inf = self._found  # type: ignore[attr-defined]
        self._scales = dtype == torch.float16
        self._scale = torch.full((), FIRST_SCALE if self._scales else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        # Skipped steps: all, the last ones in a row, the longest row since `check`.
        self._skipped = torch.zeros(3, device=device)

    def start(self, lr: float) -> None:
        """Begin a step at this learning rate."""
        set_lr(self.optimizer, lr)
        self._buffers_before = self._buffers.copies()
        self._parts_left = self.schedule.accumulate

    def learn(self, views: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """Add the gradient of a part of this rank's batch, `part_size` views of it.

        Args:
            views: (B, c, S, S).
            teacher_logits: (B, C).
            target: Class ids (B,) int64 or probabilities (B, C); not looked at if alpha is 1.

        Returns:
            The part's share of the mean loss of this rank's batch; those of all parts add up to it.
        """
        self._parts_left -= 1
        apart: AbstractContextManager[None] = nullcontext()
        if self._parts_left > 0 and isinstance(self.network, DistributedDataParallel):
            apart = self.network.no_sync()  # Ranks add up gradients once, with the last part.
        with apart, self.autocast:
            student_logits = self.network(views)  # (B, C)
        hard = self._alpha < 1
        loss, grad = kd_loss_and_grad(
            student_logits, teacher_logits, target if hard else None,
            alpha=self._alpha if hard else None, temperature=self._temperature,
            num_items=self._batch, grad_scale=self._scale if self._scales else 1.0,
        )  # fmt: skip
        # 0 if the loss is finite, else NaN: it can be infinite where its gradient is not.
        student_logits.backward(grad.add_(loss * 0))
        return loss

    def backward(self, loss: Tensor) -> Tensor:
        """`learn` for a loss of one's own: a part's share of the batch's mean loss, ()."""
        value = loss.detach()
        loss.backward((self._scale + value * 0).to(loss.dtype))
        return value

    def finish(self) -> None:
        """Take the step, unless its loss or gradient is not finite."""
        assert self._buffers_before is not None, "start comes first"
        grads = [p.grad for p in self._parameters if p.grad is not None]
        self._found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(
            grads, self._found, self._scale.reciprocal()
        )
        if self.schedule.max_grad_norm:
            nn.utils.clip_grad_norm_(self._parameters, self.schedule.max_grad_norm)
        self._updates = True
        self._buffers.put_back(self._buffers_before, self._found > 0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(1 - self._found)
        if self._scales:
            torch._amp_update_scale_(
                self._scale, self._growth, self._found, GROWTH, BACKOFF, GROWTH_STEPS
            )
        self._count()
        self._updates, self._buffers_before = False, None

    def give_up(self) -> int:
        """After an error: take a step that was begun as one that was skipped.

        Returns:
            How many that are: 0 or 1.

        Raises:
            RuntimeError: The error came while weights changed.
        """
        if self._buffers_before is None:
            return 0
        if self._updates:
            raise RuntimeError("weights are half changed")
        self.optimizer.zero_grad(set_to_none=True)
        self._found.fill_(1)
        self._buffers.put_back(self._buffers_before, self._found > 0)
        self._count()
        self._buffers_before = None
        return 1

    def warm_up(self, views: Tensor) -> None:
        """Run forward and backward pass, which compiles them; `undo_warm_up` follows."""
        self._before_warm_up = self._buffers.copies()
        with self.autocast:
            logits = self.network(views)
            check_logits("student", logits, len(views))
            logits.sum().backward()

    def undo_warm_up(self) -> None:
        """Leave no trace of it in what a checkpoint saves; again if an error cut this short."""
        if self._before_warm_up is not None:
            self._found.fill_(1)
            self._buffers.put_back(self._before_warm_up, self._found > 0)
            self.optimizer.zero_grad(set_to_none=True)
        self._before_warm_up = None

    def counts(self) -> dict[str, Tensor]:
        """Skipped steps, all and the longest row of them since `check`; on the device."""
        return {"skipped_steps": self._skipped[0], "skipped_in_a_row": self._skipped[2]}

    def check(self, skipped_in_a_row: int) -> None:
        """Begin a new search for the longest row of skipped steps.

        Args:
            skipped_in_a_row: What `counts` said.

        Raises:
            NotFiniteError: Too many steps in a row had a loss or gradient that is not finite.
        """
        self._skipped[2].zero_()
        if skipped_in_a_row >= self.schedule.max_skipped_steps:
            raise NotFiniteError(
                f"{skipped_in_a_row} steps in a row had a loss or gradient that is not finite, "
                f"expected fewer than max_skipped_steps={self.schedule.max_skipped_steps}; none of "
                "them changed the student; lower lr, look at what the teacher gives, or set "
                "dtype=float32"
            )

    def state_dict(self) -> dict[str, Any]:
        """Loss scale and counts; student, optimizer and average have states of their own."""
        return {"scale": self._scale, "growth": self._growth, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, value in state.items():
            getattr(self, f"_{name}").copy_(value)

    def _count(self) -> None:
        total, row, longest = self._skipped.unbind()
        total.add_(self._found)
        row.add_(self._found).mul_(self._found)
        torch.maximum(longest, row, out=longest)
