"""Mixup and cutmix of a batch of views, replayable from (seed, step).

Shapes: B views, C classes, c channels, S side of a view.
Sources: Zhang et al., arXiv 1710.09412 (mixup); Yun et al., arXiv 1905.04899 (cutmix); Cheng,
"Generating beta variates with nonintegral shape parameters", CACM 21, 1978 (algorithm BA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dmkd_fast.rng import philox
from dmkd_fast.runtime import checks, tensor_checks
from dmkd_fast.runtime.errors import invalid

K = TypeVar("K")
_FOR_PARTNERS, _FOR_NUMBERS = 0, 1  # sub-counters: separate random numbers within a step


class Mixed(NamedTuple):
    """Mixed views, with the partners and the weight that mix their labels.

    A hard-label loss is `lam * loss(logits, target) + (1 - lam) * loss(logits, target[partner])`.
    A teacher sees the mixed views and needs neither `partner` nor `lam`.
    """

    views: Tensor
    """(B, c, S, S), channels_last."""
    partner: Tensor
    """(B,) int64, a permutation: the row that each row was mixed with."""
    lam: float
    """Weight of a row's own view and target, in [0, 1]."""

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """Mix hard labels (B,) as the views were mixed, to probabilities (B, C), float32."""
        tensor_checks.rows("labels", labels, count=len(self.partner), device=self.partner.device)
        checks.whole("num_classes", num_classes, low=1)
        tensor_checks.within("labels", labels, low=0, high=num_classes - 1)
        targets = labels.new_zeros((len(labels), num_classes), dtype=torch.float32)
        targets.scatter_(1, labels[:, None], self.lam)
        rest = torch.full_like(targets[:, :1], 1 - self.lam)
        return targets.scatter_add_(1, labels[self.partner][:, None], rest)


class Mixer:
    """Mix each view of a batch with another one by mixup, cutmix, or either with probability 1/2.

    The host draws one weight `lam` for the whole batch from Beta(alpha, alpha). The device draws
    the partners. Nothing waits for the device.

    Args:
        mixup_alpha: Alpha of mixup, lam * view + (1 - lam) * partner; 0 turns mixup off.
        cutmix_alpha: Alpha of cutmix, which pastes a square of the partner's pixels, clipped at
            the edges; 0 turns cutmix off.
        seed: Seed of weights, squares and partners.

    Raises:
        TypeError, UserError: An alpha is negative, not finite or above 10**6, both are 0, or the
            seed is out of range.

    Examples:
        >>> import torch
        >>> from dmkd_fast import Mixer
        >>> mixed = Mixer(mixup_alpha=0.2)(torch.ones(4, 3, 8, 8), step=0)
        >>> mixed.views.shape
        torch.Size([4, 3, 8, 8])
        >>> mixed.targets(torch.tensor([0, 1, 2, 0]), num_classes=3).sum(dim=1)
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, seed: int = 0
    ) -> None:
        # Above 10**6 all weights are 0.5 to three digits.
        checks.number("mixup_alpha", mixup_alpha, low=0, high=1e6)
        checks.number("cutmix_alpha", cutmix_alpha, low=0, high=1e6)
        checks.whole("seed", seed, high=checks.MAX_SEED)
        if mixup_alpha == cutmix_alpha == 0:
            fix = "leave the mixer out to mix nothing"
            raise invalid("mixup_alpha, cutmix_alpha", "0 and 0", "one above 0", fix)
        self.mixup_alpha, self.cutmix_alpha, self.seed = mixup_alpha, cutmix_alpha, seed

    def __call__(self, views: Tensor, *, step: int) -> Mixed:
        """Mix one batch.

        Args:
            views: (B, c, S, S) of any float dtype; not changed.
            step: Number of the step, non-negative. A repeated step mixes in the same way.

        Returns:
            Mixed views, partners and weight.
        """
        _check_views(views)
        return self._mixed(views, step, self.partners(step, len(views), views.device))

    def renderings(self, views: Mapping[K, Tensor], *, step: int) -> dict[K, Mixed]:
        """Mix one batch that several networks look at, each in its own rendering.

        Args:
            views: Renderings (B, c, S, S) of the same crops in the same order; S may differ.
            step: Number of the step, non-negative.

        Returns:
            Result of `__call__` for each rendering. All have the same partners, and the square lies
            at the same place of the image. Cutmix cuts whole pixels, so the weights of renderings
            of different size differ slightly.
        """
        if not views:
            raise invalid("views", "none", "at least one rendering")
        first = next(iter(views.values()))
        for batch in views.values():
            _check_views(batch, count=len(first))
        partner = self.partners(step, len(first), first.device)
        return {name: self._mixed(batch, step, partner) for name, batch in views.items()}

    def _mixed(self, views: Tensor, step: int, partner: Tensor) -> Mixed:
        lam, square = self.parameters(step, views.shape[-2], views.shape[-1])
        rows = views.permute(0, 2, 3, 1)  # (B, S, S, c)
        if square is None:
            mixed = torch.lerp(rows[partner], rows, lam)
        else:
            top, bottom, left, right = square
            mixed = rows.clone(memory_format=torch.contiguous_format)
            mixed[:, top:bottom, left:right] = rows[:, top:bottom, left:right][partner]
        return Mixed(mixed.permute(0, 3, 1, 2), partner, lam)

    def parameters(
        self, step: int, height: int, width: int
    ) -> tuple[float, tuple[int, int, int, int] | None]:
        """Return the weight of a step and, for cutmix, its square (top, bottom, left, right)."""
        checks.whole("step", step, high=checks.MAX_SEED)
        numbers = _uniforms(self.seed, step)
        which, down, right = next(numbers), next(numbers), next(numbers)
        either = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        if self.cutmix_alpha == 0 or (either and which < 0.5):
            return _beta(self.mixup_alpha, numbers), None
        half = 0.5 * math.sqrt(1 - _beta(self.cutmix_alpha, numbers))
        sides = [
            (
                max(0, int(place * side) - int(half * side)),
                min(side, int(place * side) + int(half * side)),
            )
            for place, side in ((down, height), (right, width))
        ]
        (top, bottom), (first, last) = sides
        lam = 1 - (bottom - top) * (last - first) / (height * width)
        return lam, (top, bottom, first, last)

    def partners(self, step: int, count: int, device: torch.device) -> Tensor:
        """Return the partner of each row at a step: a permutation, (count,) int64."""
        checks.whole("step", step, high=checks.MAX_SEED)
        steps = torch.full((1,), step, dtype=torch.int64, device=device)
        bits = philox.random_bits(
            self.seed, steps, step=_FOR_PARTNERS, stream=philox.STREAM_MIX, count=count
        )
        return bits[0].argsort(stable=True)


def _check_views(views: Tensor, count: int | None = None) -> None:
    if views.ndim != 4 or count not in (None, len(views)) or not views.is_floating_point():
        expected = f"({'B' if count is None else count}, c, S, S) of a floating-point dtype"
        raise invalid("views", f"{tuple(views.shape)} {views.dtype}", expected)


def _uniforms(seed: int, step: int) -> Iterator[float]:
    """Yield the random numbers in (0, 1) of one step, on the host."""
    generator: Any = philox.philox  # works on Python integers as well as on tensors
    for block in range(2**32):
        words = generator(
            seed, step & 0xFFFFFFFF, step >> 32, _FOR_NUMBERS | (philox.STREAM_MIX << 24), block
        )
        yield from (((word >> 8) + 0.5) * 2.0**-24 for word in words)


def _beta(alpha: float, numbers: Iterator[float]) -> float:
    """Draw a number from Beta(alpha, alpha)."""
    slope = 1 / alpha if alpha <= 1 else math.sqrt((2 * alpha - 2) / (2 * alpha**2 - 2 * alpha))
    while True:
        first, second = next(numbers), next(numbers)
        v = max(-600.0, min(600.0, slope * math.log(first / (1 - first))))  # exp must not overflow
        w = alpha * math.exp(v)
        bound = 2 * alpha * math.log(2 * alpha / (alpha + w)) + (alpha + 1 / slope) * v
        if bound - math.log(4) >= math.log(first * first * second):
            return w / (alpha + w)
