"""Length, batch size and intervals of a run, and its learning rate as a function of the step.

`lr_at(step)` needs no state, so a resumed run continues with the same learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmkd_fast.runtime import checks
from dmkd_fast.runtime.checks import check_accumulate, check_milestones
from dmkd_fast.runtime.errors import invalid

TIMM = "timm:"
"""Prefix of the names of timm's optimizers."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length, batch size and intervals of a run, its optimizer and its learning rate.

    Raises:
        TypeError, UserError: A number is out of range, `accumulate` does not divide the batch
            size, or `milestones` are not increasing in (0, 1).
    """

    batch_size: int
    """Views per optimizer step, all processes together."""
    num_views: int
    """Views in the whole run."""
    lr: float
    """Peak learning rate."""
    name: str = "adamw"
    """Optimizer: "sgd", "adamw", "muon", or "timm:NAME" for one of `timm.optim`."""
    momentum: float = 0.9
    """Momentum of SGD and Muon, or beta1 of AdamW and the like."""
    nesterov: bool = True
    """Whether SGD uses Nesterov momentum."""
    weight_decay: float = 0.0
    """Weight decay, decoupled for AdamW and Muon; biases and normalization are never decayed."""
    warmup: float = 0.05
    """Fraction of the steps with a rising learning rate."""
    milestones: tuple[float, ...] = ()
    """Fractions of the steps at which the rate is multiplied by `decay`; empty: cosine to zero."""
    decay: float = 0.1
    """Factor at each milestone."""
    ema_decay: float = 0.0
    """Decay per step of the weight EMA, which is evaluated and saved; 0: the student itself."""
    max_grad_norm: float = 0.0
    """Norm to which larger gradients are scaled down; 0: no limit."""
    accumulate: int = 1
    """Number of equal micro-batches of a step, which pass through the networks one by one."""
    max_skipped_steps: int = 20
    """Steps in a row with a loss or gradient that is not finite, after which the run ends."""
    checkpoint_every_s: float = 600.0
    """Seconds between checkpoints."""
    log_every_steps: int = 50
    """Optimizer steps between log lines."""
    num_evaluations: int = 8
    """Evaluations during a run, the last step included; only with a test set."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "num_views",
            "accumulate",
            "max_skipped_steps",
            "log_every_steps",
            "num_evaluations",
        ):
            checks.whole(name, getattr(self, name), low=1, high=2**53)
        for name in ("lr", "decay"):
            checks.number(name, getattr(self, name), low=0, above=True)
        for name in ("weight_decay", "max_grad_norm", "checkpoint_every_s"):
            checks.number(name, getattr(self, name), low=0)
        for name in ("momentum", "warmup", "ema_decay"):
            if checks.number(name, getattr(self, name), low=0, high=1) == 1:
                raise invalid(name, 1, "less than 1", "lower it")
        if self.name not in ("sgd", "adamw", "muon") and not str(self.name).startswith(TIMM):
            expected = "sgd, adamw, muon or timm:NAME"
            raise invalid("name", f"{self.name!r:.60}", expected, "choose one")
        check_accumulate(self.accumulate, batch_size=self.batch_size)
        check_milestones(self.milestones, warmup=self.warmup)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps; the last step may take the run beyond `num_views`."""
        return -(-self.num_views // self.batch_size)

    def is_evaluated(self, step: int) -> bool:
        """Return whether to evaluate after `step` steps (`num_evaluations` times, evenly)."""
        nearest = -(-step * self.num_evaluations // self.num_steps)
        return step > 0 and self.num_steps * nearest // self.num_evaluations == step

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step.

        Examples:
            >>> from dmkd_fast import Schedule
            >>> schedule = Schedule(batch_size=10, num_views=1000, lr=0.1, warmup=0.1)
            >>> [schedule.lr_at(step) for step in (0, 4, 9, 55)]
            [0.01, 0.05, 0.1, 0.05]
        """
        return lr_at(
            step,
            num_steps=self.num_steps,
            peak=self.lr,
            warmup=self.warmup,
            milestones=self.milestones,
            decay=self.decay,
        )


def lr_at(
    step: int,
    *,
    num_steps: int,
    peak: float,
    warmup: float,
    milestones: Sequence[float] = (),
    decay: float = 0.1,
) -> float:
    """Return the learning rate of a step.

    It rises linearly to `peak` over the first `warmup * num_steps` steps. Then it follows a cosine
    to zero or, with milestones (fractions of the steps), is multiplied by `decay` at each one.
    """
    num_warmup = int(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if milestones:
        return peak * decay ** sum(step >= round(milestone * num_steps) for milestone in milestones)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
