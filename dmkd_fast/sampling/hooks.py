"""What callers can add between the denoiser and a step, and between the sampler and the ring.

Guides and selections are Python objects; the setting hooks only records their names. An object that
looks at more than its arguments, such as the student, says so with `is_function_of_id = False`. Its
images cannot be made again from their ids, so that only the block files of a run can restore them.

Shapes: B images, c channels, h x w latent cells, H x W pixels, k candidates for an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmkd_fast.runtime import checks, tensor_checks
from dmkd_fast.runtime.errors import invalid


class Guide(Protocol):
    """Corrects the image estimate of every step, as `Guidance(guide=)`.

    It runs without gradients; `torch.enable_grad()` turns them on inside. It must not wait for the
    device, and it must treat each image by itself.
    """

    @property
    def is_function_of_id(self) -> bool:
        """Whether corrections depend on the arguments alone, and not on something that changes."""
        ...

    def __call__(self, image_estimate: Tensor, labels: Tensor, step: Tensor) -> Tensor:
        """Return what is added to the image estimate, before it is clipped.

        Args:
            image_estimate: Estimate of the clean image, or of its latents, (B, c, h, w) float32;
                pixels are in [-1, 1]. It must not be changed in place.
            labels: Classes of the job, (B,) int64.
            step: Index of the step, () int64 on the device.

        Returns:
            (B, c, h, w) float32.
        """
        ...


class Score(Protocol):
    """Scores candidates; a higher score is better, and NaN is worse than any number."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return one score per image, (B,).

        Args:
            images: (B, c, H, W) uint8.
            labels: Classes of the job, (B,) int64.
        """
        ...


class Select(Protocol):
    """Chooses one of the candidates for each image."""

    def __call__(self, images: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        """Return the index of the candidate to keep for each image, (B,) int64 in [0, k).

        Args:
            images: Candidates for each image, (B, k, c, H, W) uint8.
            labels: Classes of the job, (B,) int64.
            scores: (B, k) float32.
        """
        ...


def best(images: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """Return the candidate with the highest score for each image, (B,) int64."""
    del images, labels
    return scores.argmax(1)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Generate several candidates for each image and keep one, by score.

    The candidates of image i have the class of image i and the noise of the ids k * i to
    k * i + k - 1.

    Raises:
        TypeError, UserError: A field is of a wrong type or out of range.
    """

    score: Score
    """Function that scores candidates."""
    num_candidates: int
    """Number of candidates for an image, k."""
    is_function_of_id: bool
    """Whether `score` and `select` depend on their arguments alone."""
    select: Select = best
    """Function that chooses among the candidates; by default the best score."""

    def __post_init__(self) -> None:
        checks.whole("selection.num_candidates", self.num_candidates, low=2, high=1024)
        for name in ("score", "select"):
            if not callable(getattr(self, name)):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"selection.{name}: got {got}, expected a function")
        check_says("selection", self)

    @torch.no_grad()
    def write(
        self, sample: Callable[..., object], ids: Tensor, labels: Tensor, *, out: Tensor
    ) -> None:
        """Generate the candidates for a block of images and write the kept ones to `out`.

        Args:
            sample: `DiffusionSampler.sample`.
            ids: Image ids, (B,) int64.
            labels: Classes, (B,) int64.
            out: (B, c, H, W) uint8.

        Raises:
            UserError: Scores or choices have a wrong shape, or choices are not those of candidates.
        """
        k = self.num_candidates
        candidates = (ids[:, None] * k + torch.arange(k, device=ids.device)).flatten()
        images = out.new_empty((len(candidates), *out.shape[1:]))
        repeated = labels.repeat_interleave(k)
        sample(candidates, repeated, out=images)
        scores = self.score(images, repeated)
        _check("selection.score", scores, (len(candidates),))
        images = images.unflatten(0, (len(ids), k))
        # `argmax` takes NaN for the best score.
        scores = scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        keep = self.select(images, labels, scores.view(len(ids), k))
        _check("selection.select", keep, (len(ids),))
        tensor_checks.rows("selection.select", keep)
        tensor_checks.within("selection.select", keep, low=0, high=k - 1)
        out.copy_(images[torch.arange(len(ids), device=ids.device), keep])


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The objects of a caller that take part in the making of images."""

    guide: Guide | None = None
    """Corrects the image estimate of every step."""
    selection: Selection | None = None
    """Keeps some of the images that are generated."""

    @property
    def in_use(self) -> Sequence[Guide | Selection]:
        """The objects that are given."""
        return [hook for hook in (self.guide, self.selection) if hook is not None]

    @property
    def is_function_of_id(self) -> bool:
        """Whether images depend on their ids alone."""
        return all(hook.is_function_of_id for hook in self.in_use)

    @property
    def names(self) -> list[str]:
        """Names of the objects, compared when a run is resumed."""
        names = [] if self.guide is None else [f"guide {_name(self.guide)}"]
        if self.selection is not None:
            one = self.selection
            names += [f"selection {_name(one.score)} {_name(one.select)} of {one.num_candidates}"]
        return names


NO_HOOKS = Hooks()


def check_says(name: str, hook: object) -> None:
    """Check that a hook says whether it depends on its arguments alone.

    Raises:
        UserError: It has no `is_function_of_id`, or one that is not True or False.
    """
    if not isinstance(value := getattr(hook, "is_function_of_id", None), bool):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        fix = "set False if it looks at anything that changes, such as the student"
        raise invalid(f"{name}.is_function_of_id", got, "True or False", fix)


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)


def _check(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(values, Tensor) or values.shape != shape:
        got = f"{tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise invalid(name, got, f"a tensor {shape}")
