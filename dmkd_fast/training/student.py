"""One optimizer step of the student: gradients, optimizer, weight EMA, skipping of bad steps.

A step whose loss or gradient is not finite is skipped. With sgd, adamw and muon of `optim.py` the
device decides this and the host never waits; with any other optimizer the host reads one flag a
step. A loss that is not finite also makes the gradient not finite; ranks average their gradients,
so all of them take the same decision.
Shapes: B views in a micro-batch, C classes.
Source: Micikevicius et al., "Mixed precision training" (arXiv 1710.03740), on loss scaling.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dmkd_fast.checkpoint.step_folders import Stateful
from dmkd_fast.runtime.cuda_graph import CaptureError
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import NotFiniteError, invalid
from dmkd_fast.training.ema import Buffers, WeightEMA
from dmkd_fast.training.objective import Objective, TopLogits
from dmkd_fast.training.optim import build_optimizer, check_settings, set_lr
from dmkd_fast.training.schedule import Schedule
from dmkd_fast.views.spec import check_logits

# Defaults of torch.amp.GradScaler. The loss scale keeps float16 gradients from underflow; it is
# halved by a step that overflows, and doubled after GROWTH_STEPS steps that did not.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000


Loss = Callable[[Tensor, Any, Tensor], Tensor]
"""Function of student logits (B, C), teacher logits (B, C) and target that returns a mean, ().

The teacher logits are `TopLogits` where shards store the largest ones only."""


class StudentTrainer:
    """Train a student on the logits of a teacher.

    `start`, one `learn` for each micro-batch, and `finish` make one optimizer step.

    Args:
        student: Network to train in place, (B, c, S, S) views -> (B, C) logits.
        schedule: Length and batch size (of all ranks together), optimizer, weight EMA, clipping.
        loss: Loss that `learn` minimizes: an `Objective`, or any function of the student's logits
            (B, C), the teacher's and the target that returns the mean over the rows, (). It runs
            under autocast.
        optimizer: Optimizer of the student's parameters; None: the one that `schedule` names. The
            schedule sets its learning rate, times `lr_scale` of a parameter group if there is one.
        dtype: Autocast dtype; float32 turns autocast off, float16 turns loss scaling on.
        compile: Whether to use torch.compile on the student, and to let a `Distiller` capture its
            steps as a CUDA graph.
        ranks: This process among those that train the same student, each on its part of the batch.

    Raises:
        UserError: The batch does not split into equal micro-batches, no parameter of the student
            requires a gradient, or a checkpoint could not keep the settings of the optimizer.

    Attributes:
        model: The student.
        network: The student with its wrappers (torch.compile, DistributedDataParallel), if any.
        batch_size: Views of a step on this rank.
        micro_batch_size: Views that pass through the networks together.
        optimizer: Optimizer of the student.
        average: Weight EMA of the student.
    """

    def __init__(
        self,
        student: nn.Module,
        schedule: Schedule,
        loss: Objective | Loss | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.schedule, self.ranks = student.train(), schedule, ranks
        self.loss = Objective() if loss is None else loss
        self.batch_size = ranks.per_rank(
            "batch_size", schedule.batch_size, unit=schedule.accumulate
        )
        self.micro_batch_size = self.batch_size // schedule.accumulate
        fast: Any = torch.compile(student, dynamic=False) if compile else student
        if not any(p.requires_grad for p in student.parameters()):
            got = f"a {type(student).__name__} without parameters that require a gradient"
            raise invalid("student", got, "some to train", "give another network or unfreeze it")
        self.device = device = next(student.parameters()).device
        self.network = ranks.parallel(fast, device)  # This copies rank 0's weights to all ranks.
        self.optimizer = optimizer or build_optimizer(student, schedule)
        self.is_compiled, self._is_own = compile, optimizer is None
        check_settings("optim.name" if self._is_own else "optimizer", self.optimizer)
        self._settings: list[dict[str, Any]] = []  # of the optimizer's groups, before a resume
        # Learning rates that a captured step reads, one for each parameter group.
        self._rates: list[Tensor] = []
        self.average = WeightEMA(student, decay=schedule.ema_decay)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        self._buffers = Buffers(student)
        self._before_warm_up: list[Tensor] | None = None
        self._buffers_before: list[Tensor] | None = None  # not None during a step
        self._updates = False  # True while a step changes weights
        self._micro_batches_left = 0
        # Fused optimizers leave weights, moments and step counts unchanged if this is not 0. For
        # others the host has to read it, also for fused ones from outside, whose moments may have
        # no value yet.
        self._found = torch.zeros((), device=device)
        self._is_trial = torch.zeros((), device=device)  # 1: steps are tried out and skipped
        self._static: list[Tensor] = []  # buffers that a captured step reads
        decides = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self._is_fused = self._is_own and decides
        if self._is_fused:  # Others refuse a step that has it.
            self.optimizer.found_inf = self._found  # type: ignore[attr-defined]
        self._scales = dtype == torch.float16
        self._scale = torch.full((), FIRST_SCALE if self._scales else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        # [total skipped, current streak, longest streak since `check`]
        self._skipped = torch.zeros(3, device=device)

    def start(self, lr: float | None = None) -> None:
        """Start a step with this learning rate; None keeps the one that is set."""
        if lr is not None:
            set_lr(self.optimizer, lr)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
                rate.fill_(group["lr"])
        self._buffers_before = self._buffers.copies()
        self._micro_batches_left = self.schedule.accumulate

    def learn(self, views: Tensor, teacher_logits: Tensor | TopLogits, target: Tensor) -> Tensor:
        """Add the gradient of one micro-batch of this rank's batch.

        Args:
            views: Views (B, c, S, S) with B = `micro_batch_size`.
            teacher_logits: Logits (B, C) of the teacher, or the largest ones of each view.
            target: Class ids (B,) int64 or probabilities (B, C); see `Objective.uses_target`.

        Returns:
            The sum of the micro-batch's losses divided by the size of this rank's batch, (). Over
            all micro-batches these values add up to the mean loss of the batch.

        Raises:
            UserError: A custom loss returns something else than a scalar with a gradient.
        """
        self._micro_batches_left -= 1
        alone: AbstractContextManager[None] = nullcontext()
        if self._micro_batches_left > 0 and isinstance(self.network, DistributedDataParallel):
            alone = self.network.no_sync()  # Gradients are averaged once, at the last micro-batch.
        with alone, self.autocast:
            student_logits = self.network(views)  # (B, C)
        if not isinstance(self.loss, Objective):
            with self.autocast:
                loss = self.loss(student_logits, teacher_logits, target)
            if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
                got = f"{loss!r:.80} from {self.loss!r:.80}"
                raise invalid("loss", got, "a tensor () with a gradient", "return the mean")
            return self.backward(loss / self.schedule.accumulate)
        return self.loss.backward(
            student_logits,
            teacher_logits,
            target,
            num_items=self.batch_size,
            grad_scale=self._scale if self._scales else 1.0,
        )

    def backward(self, loss: Tensor) -> Tensor:
        """Add the gradient of a custom loss (), a micro-batch's part of the batch's mean loss."""
        value = loss.detach()
        loss.backward((self._scale + value * 0).to(loss.dtype))
        return value

    def finish(self) -> None:
        """Update the weights, unless the loss or gradient is not finite.

        Raises:
            CaptureError: The student replaced a buffer, which a captured step would not see.
        """
        assert self._buffers_before is not None, "start comes first"
        grads = [p.grad for p in self._parameters if p.grad is not None]
        self._found.copy_(self._is_trial)
        torch._amp_foreach_non_finite_check_and_unscale_(
            grads, self._found, self._scale.reciprocal()
        )
        if self.schedule.max_grad_norm:
            nn.utils.clip_grad_norm_(self._parameters, self.schedule.max_grad_norm)
        self._updates = True
        self._buffers.put_back(self._buffers_before, self._found > 0)
        if self._is_fused or not self._found.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(1 - self._found)
        if self._scales:
            torch._amp_update_scale_(
                self._scale, self._growth, self._found, GROWTH, BACKOFF, GROWTH_STEPS
            )
        self._count()
        self._updates, self._buffers_before = False, None
        if any(a is not b for a, b in zip(self._static, self._all_buffers(), strict=False)):
            raise CaptureError("the student replaces a buffer")

    def replay(self, step: Callable[[], Tensor]) -> Tensor:
        """Take a captured step, after `start` and in place of `learn` and `finish`."""
        self._updates = True
        loss = step()
        self._updates, self._buffers_before = False, None
        return loss

    def why_not_captured(self) -> str:
        """Return why steps cannot be captured as a CUDA graph; empty if they can."""
        if self.ranks.world_size > 1:
            return f"{self.ranks.world_size} ranks average their gradients"
        if not isinstance(self.loss, Objective):
            return "the loss is a function from outside"
        if not self._is_own:
            return "the optimizer is from outside"
        if not self._is_fused:
            return f"{self.schedule.name} reads on the host whether a step is finite"
        return ""

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Let steps inside change nothing, and read their learning rates from the device."""
        groups = self.optimizer.param_groups
        kept = (self._scale, self._growth, self._skipped)
        values = [value.clone() for value in kept]
        started = self._buffers_before
        before: list[dict[str, Any]] = [
            {name: group[name] for name in ("lr", "capturable") if name in group}
            for group in groups
        ]
        self._rates = [torch.full((), group["lr"], device=self.device) for group in groups]
        self._static = self._all_buffers()
        self._is_trial.fill_(1)
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(dict.fromkeys(group.keys() & {"capturable"}, True), lr=rate)
        try:
            with warnings.catch_warnings():
                # Two of the three steps inside are not captured.
                warnings.filterwarnings("ignore", ".*capturable=True")
                yield
        finally:
            for group, own in zip(groups, before, strict=True):
                group.update(own)
            for mine, value in zip(kept, values, strict=True):
                mine.copy_(value)
            self._is_trial.zero_()
            self._static = []
            self._updates, self._buffers_before = False, started
            self.optimizer.zero_grad(set_to_none=True)

    def give_up(self) -> int:
        """Discard the current step and count it as skipped; called after an error.

        Returns:
            The number of discarded steps: 1, or 0 outside a step.

        Raises:
            RuntimeError: The error occurred while the weights were being changed.
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

    def logits(self, views: Tensor) -> Tensor:
        """Return the student's logits (B, C), checked, for views (B, c, S, S).

        Raises:
            UserError: The student returns something else.
        """
        with self.autocast:
            logits: Tensor = self.network(views)
        check_logits("student", logits, len(views))
        return logits

    def warm_up(self, loss_of: Callable[[], Tensor]) -> None:
        """Compile by one forward and backward pass of a loss; call `undo_warm_up` afterwards."""
        self._before_warm_up = self._buffers.copies()
        loss_of().backward()

    def undo_warm_up(self) -> None:
        """Restore buffers and gradients to their state before `warm_up`.

        May be called again if an error interrupted the first call.
        """
        if self._before_warm_up is not None:
            self._found.fill_(1)
            self._buffers.put_back(self._before_warm_up, self._found > 0)
            self.optimizer.zero_grad(set_to_none=True)
        self._before_warm_up = None

    def counts(self) -> dict[str, Tensor]:
        """Return the total of skipped steps and the longest streak since `check`, on the device."""
        return {"skipped_steps": self._skipped[0], "skipped_in_a_row": self._skipped[2]}

    def check(self, skipped_in_a_row: int) -> None:
        """Stop a run that skipped too many steps in a row, and reset the longest streak.

        Args:
            skipped_in_a_row: Longest streak of skipped steps, as `counts` reports it.

        Raises:
            NotFiniteError: Too many steps in a row had a loss or gradient that is not finite.
        """
        self._skipped[2].zero_()
        if skipped_in_a_row >= self.schedule.max_skipped_steps:
            raise NotFiniteError(
                f"{skipped_in_a_row} steps in a row had a loss or gradient that is not finite, "
                f"expected fewer than max_skipped_steps={self.schedule.max_skipped_steps}; none of "
                "them changed the student; lower lr, look at the teacher's logits, or set "
                "dtype=float32"
            )

    def objects(self) -> dict[str, Stateful]:
        """Return the objects to save or to restore, which are the same on all ranks."""
        # A checkpoint brings settings of its own. `start` sets the rate.
        self._settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        return {
            "student": self.model,
            "optimizer": self.optimizer,
            "average": self.average,
            "trainer": self,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return loss scale and counts; student, optimizer and EMA have their own state dicts."""
        counts = {"growth": self._growth, "skipped": self._skipped}
        return {"scale": self._scale, "scales": self._scales, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`; restore that of the optimizer first.

        Raises:
            UserError: The state of the optimizer was that of another kind.
        """
        groups = self.optimizer.param_groups if self._is_own else []
        for group, settings in zip(groups, self._settings, strict=False):
            if settings.keys() - group.keys():
                expected = "the optimizer of the checkpoint"
                raise invalid("optim.name", self.schedule.name, expected, "set it back")
            group.update(settings)
        self._skipped.copy_(state["skipped"])
        # A scale is of use to float16 only. Earlier versions did not save whether the run had one.
        if self._scales and state.get("scales", state["scale"] != 1):
            self._scale.copy_(state["scale"])
            self._growth.copy_(state["growth"])

    def _all_buffers(self) -> list[Tensor]:
        return [buffer for group in self._buffers.groups() for buffer in group]

    def _count(self) -> None:
        total, row, longest = self._skipped.unbind()
        total.add_(self._found)
        row.add_(self._found).mul_(self._found)
        torch.maximum(longest, row, out=longest)
