"""Describe a diffusion model: its modules and the facts that the sampler needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from dmkd_fast.runtime import checks
from dmkd_fast.runtime.errors import invalid

if TYPE_CHECKING:
    from dmkd_fast.denoisers.prompts.bank import PromptBank

MOST_LATENTS = 2**28


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """Modules of a diffusion model and the facts about it that the sampler needs.

    `load_denoiser` makes one from a folder. For a pixel model of your own, `module`, `scheduler`
    and `latent_shape` suffice; a class-conditional one also has `num_classes`.

    Raises:
        TypeError, UserError: A field is of a wrong type or out of range, or two fields contradict
            each other.
    """

    module: nn.Module
    """`module(latents (B, c, h, w), timesteps (B,), labels (B,))` returns (B, c, h, w), or
    (B, 2c, h, w) if it also predicts variances."""
    scheduler: dict[str, Any]
    """Content of the model's scheduler_config.json, `_class_name` included."""
    latent_shape: tuple[int, int, int]
    """Shape of one image's latents, (c, h, w)."""
    image_shape: tuple[int, int, int] = None  # type: ignore[assignment]
    """Shape of one image, (1 or 3, H, W); by default `latent_shape`, that of a pixel model."""
    decoder: nn.Module | None = None
    """Module that turns latents (B, c, h, w) into images (B, 1 or 3, H, W) in [-1, 1]; None for a
    pixel model."""
    weak: nn.Module | None = None
    """Weaker denoiser of the same latents, classes and noise levels, which guidance steers away
    from in place of the null class; None: guidance needs a null class."""
    num_classes: int = 1
    """Number of labels."""
    null_class: int | None = None
    """Label that stands for "no class"; None if the model was not trained with one."""
    class_map: tuple[int, ...] | None = None
    """The module's own index of each of `num_classes` labels; None if both are the same."""
    prompts: tuple[str, ...] = ()
    """Prompt of each of the module's own indices, for a text-to-image model."""
    num_prompts: tuple[int, ...] | None = None
    """Number of prompts of each label. They are consecutive rows of the module, from the label's
    entry in `class_map` on; (seed, id) selects the row of an image. None: one each."""
    bank: PromptBank | None = None
    """Embeddings of the prompts, where the module has only those of a micro-batch."""
    takes_guidance: bool = False
    """Whether the module has a fourth input, the guidance scales (B,)."""
    num_steps: int = 8
    """Steps of its images, where a job names no number."""
    guidance_scale: float = 1.5
    """Guidance scale of its images, where a job names none and the model can be guided."""
    license: str = "unknown"
    """License of the weights, as their model card states it."""

    def __post_init__(self) -> None:
        for name, kind in (("module", nn.Module), ("scheduler", dict)):
            if not isinstance(got := getattr(self, name), kind):
                raise TypeError(f"{name}: got {type(got).__name__}, expected {kind.__name__}")
        if math.prod(checks.image_shape(self.latent_shape, name="latent_shape")) > MOST_LATENTS:
            raise invalid("latent_shape", self.latent_shape, f"at most {MOST_LATENTS:,} numbers")
        checks.whole("num_classes", self.num_classes, low=1)
        checks.whole("num_steps", self.num_steps, low=1)
        checks.number("guidance_scale", self.guidance_scale, low=1)
        if self.null_class is not None:
            checks.whole("null_class", self.null_class)
        if self.class_map is not None:
            for label in self.class_map:
                checks.whole("class_map", label)
            if len(self.class_map) != self.num_classes:
                expected = f"one class of the model for each of num_classes={self.num_classes}"
                raise invalid("class_map", f"{len(self.class_map)} entries", expected)
        if self.image_shape is None:
            object.__setattr__(self, "image_shape", self.latent_shape)
        shape = checks.image_shape(self.image_shape)
        if self.decoder is None and shape != tuple(self.latent_shape):
            expected = f"latent_shape={tuple(self.latent_shape)} for a model without a decoder"
            raise invalid("image_shape", shape, expected, "leave it out, or give the decoder")

    @property
    def modules(self) -> list[nn.Module]:
        """All modules: the denoiser, its decoder and the weaker denoiser, if there are any."""
        return [part for part in (self.module, self.decoder, self.weak) if part is not None]

    def with_prompts(self, by_class: Sequence[Sequence[str]]) -> Denoiser:
        """Group the module's prompts by label, and return the model with these labels."""
        counts = [len(prompts) for prompts in by_class]
        prompts = tuple(prompt for some in by_class for prompt in some)
        if set(counts) == {1}:
            return replace(self, prompts=prompts)
        starts = tuple(itertools.accumulate(counts, initial=0))[:-1]
        return replace(
            self,
            num_classes=len(counts),
            class_map=starts,
            prompts=prompts,
            num_prompts=tuple(counts),
        )

    @property
    def own_steps(self) -> int:
        """Steps of its images, where a job names no number."""
        distilled = self.scheduler.get("distilled_steps")
        return distilled if isinstance(distilled, int) else self.num_steps

    @property
    def own_guidance_scale(self) -> float:
        """Guidance scale of its images, where a job names none; 1 if it cannot be guided."""
        can = self.takes_guidance or self.null_class is not None or self.weak is not None
        is_folded_in = "distilled_guidance_scale" in self.scheduler
        return self.guidance_scale if can and not is_folded_in else 1.0

    def restricted(self, class_map: tuple[int, ...]) -> Denoiser:
        """Return the same model for a job with some of its classes, in job order.

        Raises:
            UserError: An entry is not a class of the model, or is repeated.
        """
        own = self.class_map or range(self.num_classes)
        repeated = len(set(class_map)) < len(class_map)
        if repeated or not set(class_map) <= set(own):
            without = "" if self.class_map is None else f" without {self.null_class}"
            got = f"{min(class_map)} to {max(class_map)}{', some twice' if repeated else ''}"
            expected = f"different classes from {min(own)} to {max(own)}{without}"
            raise invalid("denoiser.class_map", got, expected, "correct the map")
        return replace(self, num_classes=len(class_map), class_map=class_map)
