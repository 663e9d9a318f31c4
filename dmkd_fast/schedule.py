"""Length, batch and rhythm of a run, and its learning rate as a pure function of the step.

Stands on floor 0. `lr_at(step)` needs no state, so a resumed run goes on with the same rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dmkd_fast import checks


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Optimizer settings and the rhythm of a run; see `OptimConfig`, `TrainConfig`.

    Raises:
        TypeError, ValueError: A number is out of range, `accumulate` does not divide the batch, or
            `milestones` do not rise in (0, 1).
    """

    batch_size: int
    num_views: int
    lr: float
    name: Literal["sgd", "adamw"] = "adamw"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    warmup: float = 0.05
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    ema_decay: float = 0.0
    max_grad_norm: float = 0.0
    accumulate: int = 1
    max_skipped_steps: int = 20
    checkpoint_every_s: float = 600.0
    log_every_steps: int = 50
    num_evaluations: int = 8

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_views", "accumulate", "max_skipped_steps",
                     "log_every_steps", "num_evaluations"):  # fmt: skip
            checks.whole(name, getattr(self, name), low=1, high=2**53)
        for name in ("lr", "decay"):
            checks.number(name, getattr(self, name), low=0, above=True)
        for name in ("weight_decay", "max_grad_norm", "checkpoint_every_s"):
            checks.number(name, getattr(self, name), low=0)
        for name in ("momentum", "warmup", "ema_decay"):
            share = checks.number(name, getattr(self, name), low=0, high=1)
            if share == 1:
                raise ValueError(f"{name}: got 1, expected less than 1; lower it")
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"name: got {self.name!r:.60}, expected sgd or adamw; choose one")
        check_accumulate(self.accumulate, batch_size=self.batch_size)
        check_milestones(self.milestones, warmup=self.warmup)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; the last one may see more views than asked for."""
        return -(-self.num_views // self.batch_size)

    @property
    def micro_batch(self) -> int:
        """Views that go through the networks together."""
        return self.batch_size // self.accumulate

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        return lr_at(
            step, num_steps=self.num_steps, peak=self.lr, warmup=self.warmup,
            milestones=self.milestones, decay=self.decay,
        )  # fmt: skip


def lr_at(
    step: int, *, num_steps: int, peak: float, warmup: float, milestones: Sequence[float] = (),
    decay: float = 0.1,
) -> float:  # fmt: skip
    """Learning rate of a step: linear warm-up over `warmup * num_steps`, then down.

    Without milestones by a cosine to zero; with them by the factor `decay` at each, given as shares
    of the steps.
    """
    num_warmup = int(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if milestones:
        return peak * decay ** sum(step >= round(share * num_steps) for share in milestones)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_accumulate(accumulate: int, *, batch_size: int) -> None:
    """Refuse a number of parts that a batch does not fall into."""
    if accumulate < 1 or batch_size % accumulate:
        raise ValueError(
            f"accumulate: got {accumulate}, expected a divisor of batch_size={batch_size}; change "
            "one of the two"
        )


def check_milestones(milestones: Sequence[float], *, warmup: float) -> None:
    """Refuse shares of the run that are none, do not rise, or come before the warm-up ends."""
    points = [checks.number("milestones", point) for point in milestones]
    if points != sorted(set(points)) or not all(0 < point < 1 for point in points):
        raise ValueError(
            f"milestones: got {points}, expected rising shares of the run between 0 and 1, as "
            "[0.3, 0.6, 0.9]; correct the list"
        )
    if points and points[0] < warmup:
        raise ValueError(
            f"milestones: got {points[0]} as the first, expected at least warmup={warmup}, as the "
            "rate still rises before; change one of the two"
        )
