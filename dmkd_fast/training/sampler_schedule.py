"""The samplers of a run, one after the other, and whether what they make is finite.

Beside `training/distiller.py`, which asks for the one whose time it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.data.stored import ImageReader
from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.sampling.sampler import DiffusionSampler, check_broken


class SamplerSchedule:
    """What makes or reads the images in each part of a run.

    Args:
        first: From the start.
        later: (share of the run, sampler) from which on others do, in order.
        ranks: This process among those whose images count together.
    """

    def __init__(
        self, first: DiffusionSampler | ImageReader,
        later: Sequence[tuple[float, DiffusionSampler]] = (), ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._phases = [(0.0, first), *later]
        all_ = [sampler for _, sampler in self._phases]
        self._makers = [sampler for sampler in all_ if isinstance(sampler, DiffusionSampler)]
        self._ranks = ranks

    def at(self, share: float) -> DiffusionSampler | ImageReader:
        """The one whose time it is when so much of the run is done, in [0, 1]."""
        return [sampler for start, sampler in self._phases if start <= share][-1]

    @property
    def samples(self) -> list[Callable[..., Any]]:
        """Their `sample`, in order."""
        return [sampler.sample for _, sampler in self._phases]

    def try_all(self, scratch: Tensor) -> None:
        """Make images with each once, which compiles them; those of a reader are not read.

        Args:
            scratch: Of the shape of a block of the ring; not changed.

        Raises:
            NotFiniteError: Too many are not finite: better said before a long fill.
        """
        made = torch.empty_like(scratch)
        ids = torch.arange(len(made), device=made.device)
        for sampler in self._makers:
            sampler.sample(ids, torch.zeros_like(ids), out=made)
        self.check(int(self._ranks.total(self._broken(made.device))))

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Images so far that are not finite, for the mean over ranks that `Metrics` reports."""
        return {"broken_images": self._broken(device).float() * self._ranks.world_size}

    def check(self, broken_images: int) -> None:
        """Stop a run whose images are broken.

        Args:
            broken_images: What `counts` said.

        Raises:
            NotFiniteError: They are too many of those made since the start.
        """
        made = sum(sampler.num_made for sampler in self._makers)
        check_broken(broken_images, made * self._ranks.world_size)

    def _broken(self, device: torch.device) -> Tensor:
        none = torch.zeros((), dtype=torch.int64, device=device)
        return sum((sampler.num_broken for sampler in self._makers), none)
