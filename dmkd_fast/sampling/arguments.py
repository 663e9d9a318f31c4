"""Steps and guidance of a sampler, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from dmkd_fast.denoisers.denoiser import Denoiser
from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.sampling.block_cache import BlockCache
from dmkd_fast.sampling.hooks import Guide, check_says
from dmkd_fast.sampling.noise_levels import MOST_TRAINED, Solver


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Number of steps, and the solver that takes them.

    Raises:
        TypeError, UserError: A field is of a wrong type or out of range.
    """

    count: int = 8
    """Number of steps, K."""
    solver: Solver = "auto"
    """Solver name; "auto" chooses the scheduler's own. Models trained with DDPM's noise levels
    support "ddpm", "ddim", "dpm++2m", "euler" and "euler_ancestral"; flow models "euler", "dpm++2m"
    (second order at the same cost) and "ddpm"; consistency models "consistency" alone."""
    block_cache: BlockCache | None = None
    """Blocks of a DiT that are reused at some steps; None: every step computes all blocks."""

    def __post_init__(self) -> None:
        checks.whole("steps.count", self.count, low=1, high=MOST_TRAINED)
        if self.solver not in get_args(Solver):
            raise invalid(
                "steps.solver", repr(self.solver), f"one of {', '.join(get_args(Solver))}"
            )


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance: its scales, and where it applies.

    Raises:
        TypeError, UserError: A field is of a wrong type or out of range.
    """

    scale: float = 1.0
    """Guidance scale; 1 means no guidance."""
    by_class: Mapping[int, float] = field(default_factory=dict)
    """Guidance scales of single labels, which replace `scale`. All images then cost as much as
    guided ones, also those with scale 1."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Fractions (start, stop) of the K steps: steps int(start * K) to int(stop * K) - 1 are
    guided, and the others run without the unconditional half."""
    channels: int | None = None
    """Number of leading channels that are guided (the original DiT code: 3); None means all."""
    guide: Guide | None = None
    """Function that corrects the image estimate of every step, in addition to the scales."""

    def __post_init__(self) -> None:
        checks.number("guidance.scale", self.scale, low=0, high=1e6)
        if not isinstance(self.by_class, Mapping):
            raise TypeError(
                f"guidance.by_class: got {type(self.by_class).__name__}, expected scales by label"
            )
        for label, scale in self.by_class.items():
            checks.whole("guidance.by_class", label)
            checks.number("guidance.by_class", scale, low=0, high=1e6)
        checks.fractions("guidance.interval", self.interval)
        if self.guide is not None:
            if not callable(self.guide):
                got = type(self.guide).__name__
                raise TypeError(f"guidance.guide: got {got}, expected a Guide")
            check_says("guidance.guide", self.guide)
        if self.channels is not None:
            checks.whole("guidance.channels", self.channels, low=1)

    @property
    def is_used(self) -> bool:
        """Whether any label has a scale other than 1."""
        return {self.scale, *self.by_class.values()} != {1.0}

    def scale_of(self, label: int) -> float:
        """Return the guidance scale of a label."""
        return self.by_class.get(label, self.scale)


def check_guidance(guidance: Guidance, denoiser: Denoiser) -> None:
    """Reject guidance that the model does not support.

    Raises:
        UserError: A label is not a class of the model, the model has guidance folded into its
            weights, or it has no null class.
    """
    highest = max(guidance.by_class, default=0)
    if highest >= denoiser.num_classes:
        expected = f"0 to {denoiser.num_classes - 1}, the classes of the denoiser"
        raise invalid("guidance.by_class", f"class {highest}", expected, "correct it")
    scales = [("guidance.scale", guidance.scale)]
    scales += [("guidance.by_class", scale) for scale in guidance.by_class.values()]
    used = [(name, scale) for name, scale in scales if scale != 1]
    if not used:
        return
    name, scale = used[0]
    if "distilled_guidance_scale" in denoiser.scheduler:
        folded_in = denoiser.scheduler["distilled_guidance_scale"]
        got = f"{scale} for a denoiser that has guidance {folded_in} folded in"
        raise invalid(name, got, "1", "turn guidance off")
    if denoiser.weak is not None and denoiser.takes_guidance:
        got = "a weak denoiser for a model that takes the guidance scale as an input"
        raise invalid("denoiser.weak", got, "none", "remove it")
    if denoiser.weak is None and denoiser.null_class is None and not denoiser.takes_guidance:
        got = f"{scale} for a model without a null class"
        fix = "turn guidance off, or set denoiser.null_class of a UNet trained with dropped labels"
        raise invalid(name, got, "1", fix)
