"""The samplers that a run uses one after the other, and a check that their images are finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.data.stored import ImageReader
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.sampling.sampler import DiffusionSampler, check_broken


class SamplerSchedule:
    """Select the sampler or reader in use at each point of a run.

    Args:
        first: Sampler or reader in use from the start.
        later: (progress in [0, 1], sampler that is used from there on), in order.
        ranks: Processes whose images are counted together.
    """

    def __init__(
        self,
        first: DiffusionSampler | ImageReader,
        later: Sequence[tuple[float, DiffusionSampler]] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self._phases = [(0.0, first), *later]
        all_ = [sampler for _, sampler in self._phases]
        self._makers = [sampler for sampler in all_ if isinstance(sampler, DiffusionSampler)]
        self._ranks = ranks

    def at(self, share: float) -> DiffusionSampler | ImageReader:
        """Return the sampler in use at this progress (`share`, in [0, 1]) of the run."""
        return [sampler for start, sampler in self._phases if start <= share][-1]

    @property
    def samples(self) -> list[Callable[..., Any]]:
        """The `sample` methods of all samplers, in order."""
        return [sampler.sample for _, sampler in self._phases]

    def try_all(self, scratch: Tensor) -> None:
        """Make a block of images with each sampler, so that it compiles; readers are skipped.

        Args:
            scratch: Tensor with the shape, dtype and device of a block of the ring; not changed.

        Raises:
            NotFiniteError: Too many images are not finite, found before a long fill.
        """
        made = torch.empty_like(scratch)
        ids = torch.arange(len(made), device=made.device)
        for sampler in self._makers:
            sampler.sample(ids, torch.zeros_like(ids), out=made)
        self.check(int(self._ranks.total(self._broken(made.device))))

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Return the number of images so far that are not finite.

        It is multiplied by the number of ranks, because `Metrics` reports the mean over ranks.
        """
        return {"broken_images": self._broken(device).float() * self._ranks.world_size}

    def check(self, broken_images: int) -> None:
        """Stop a run with too many images that are not finite.

        Args:
            broken_images: Number of images that are not finite, as `counts` reports it.

        Raises:
            NotFiniteError: The fraction of such images since the start is too large.
        """
        made = sum(sampler.num_made for sampler in self._makers)
        check_broken(broken_images, made * self._ranks.world_size)

    def _broken(self, device: torch.device) -> Tensor:
        none = torch.zeros((), dtype=torch.int64, device=device)
        return sum((sampler.num_broken for sampler in self._makers), none)
