"""A stream of images that are generated during training: labels, and the samplers in use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmkd_fast.runtime.distributed import ALONE, Ranks
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.sampling.hooks import Hooks, Selection
from dmkd_fast.sampling.labels import LabelStream
from dmkd_fast.sampling.sampler import DiffusionSampler, check_broken


class GeneratedImages:
    """Generate the images of a run, and check that they are finite.

    `Distiller` takes blocks of images from this stream when its ring buffer needs new ones.

    Args:
        labels: Source of image ids and classes.
        sampler: Sampler in use from the start of the run.
        later: Samplers that replace it later in the run: pairs of a progress in (0, 1), from which
            on a sampler is used, and the sampler, in order of the progress.
        selection: How many candidates to generate for an image, and which one to keep; None: each
            image is generated once and kept.
        ranks: Processes whose images are counted together.

    Raises:
        UserError: The progress of the later samplers does not rise between 0 and 1, or one of them
            has another guide.
    """

    is_exhausted = False

    def __init__(
        self,
        labels: LabelStream,
        sampler: DiffusionSampler,
        *,
        later: Sequence[tuple[float, DiffusionSampler]] = (),
        selection: Selection | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        starts = [start for start, _ in later]
        if starts != sorted(set(starts)) or not all(0 < start < 1 for start in starts):
            raise invalid("later", f"starts {starts}", "rising numbers between 0 and 1")
        guide = sampler.guidance.guide
        if any(one.guidance.guide is not guide for _, one in later):
            raise invalid("later", "samplers with another guide", "that of the first sampler")
        self.labels, self._ranks = labels, ranks
        self.samplers = ((0.0, sampler), *later)
        """All samplers, each after the progress of the run from which on it is used."""
        if later and sampler.device.type == "cuda":
            # One sampler runs at a time, and its images are copied before another one runs.
            memory = torch.cuda.graph_pool_handle(), torch.cuda.Stream(sampler.device)
            for _, each in self.samplers:
                each.graph_memory = memory
        # Broken images up to the newest written block, and up to the newest that is used. The
        # samplers' own counts may change meanwhile, on another stream.
        self._written: Tensor | None = None
        self._used: Tensor | None = None
        self.hooks = Hooks(guide=guide, selection=selection)

    @property
    def may_wait(self) -> bool:
        """Whether blocks are not made ahead of need, as they depend on when they are made."""
        return len(self.samplers) > 1 or not self.hooks.is_function_of_id

    @property
    def rewrites(self) -> list[Callable[..., object]]:
        """One function for each sampler, in order; none if images are no function of their id."""
        if not self.hooks.is_function_of_id:
            return []
        return [functools.partial(self._make, sampler) for _, sampler in self.samplers]

    def next_block(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next ids and classes, (count,) int64 each; the same until `advance`."""
        return self.labels.peek(count)

    def write(self, ids: Tensor, labels: Tensor, out: Tensor, *, progress: float) -> None:
        """Generate one image per id with the sampler in use at this progress of the run.

        Args:
            ids: Image ids, (B,) int64.
            labels: Classes, (B,) int64.
            out: Tensor for the images, (B, c, H, W) uint8, written in place.
            progress: Progress of the run in [0, 1].
        """
        sampler = [sampler for start, sampler in self.samplers if start <= progress][-1]
        self._make(sampler, ids, labels, out=out)
        self._written = self._num_broken(out.device)

    def advance(self, count: int) -> None:
        """Move past the `count` images that each rank got from `next_block`."""
        self.labels.advance(count)
        self._used = self._written
        if self._used is not None and self._used.is_cuda:  # made on the producer's stream
            self._used.record_stream(torch.cuda.current_stream(self._used.device))

    def warm_up(self, scratch: Tensor) -> None:
        """Make a block of images with each sampler, so that it compiles.

        Args:
            scratch: Tensor with the shape, dtype and device of a block of the ring; not changed.

        Raises:
            NotFiniteError: Too many images are not finite, found before a long fill.
        """
        made = torch.empty_like(scratch)
        ids = torch.arange(len(made), device=made.device)
        for _, sampler in self.samplers:
            self._make(sampler, ids, torch.zeros_like(ids), out=made)
        self._check(int(self._ranks.total(self._num_broken(made.device))))

    def counts(self, device: torch.device) -> dict[str, Tensor]:
        """Return the number of images so far that are not finite, and that were not kept.

        Both are totals of all ranks, in the mean over ranks that `Metrics` reports: the broken
        images of this rank are multiplied by the number of ranks; rejected ones are already
        counted for all.
        """
        number = self._num_broken(device) if self._used is None else self._used
        counts = {"broken_images": number.float() * self._ranks.world_size}
        if self.hooks.selection is not None:
            counts["rejected_images"] = torch.tensor(float(self._num_rejected), device=device)
        return counts

    def check(self, counts: Mapping[str, int]) -> None:
        """Stop a run with too many images that are not finite.

        Raises:
            NotFiniteError: The fraction of such images since the start is too large.
        """
        self._check(counts["broken_images"])

    def totals(self) -> dict[str, float]:
        """Return the number of images that were generated and not kept, with a selection."""
        return {} if self.hooks.selection is None else {"rejected_images": self._num_rejected}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the labels, and the names of the hooks if there are any."""
        hooks = {"hooks": self.hooks.names} if self.hooks.in_use else {}
        return {**self.labels.state_dict(), **hooks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: The run was started with other hooks.
        """
        names, before = self.hooks.names, state.get("hooks", [])
        if names != before:
            fix = "resume from Python with the same objects: dmkd_fast.distill(..., resume=True)"
            got, expected = (", ".join(part) or "none" for part in (names, before))
            raise invalid("guide and selection", got, f"those of the run, {expected}", fix)
        self.labels.load_state_dict(state)

    def _make(self, sampler: DiffusionSampler, ids: Tensor, labels: Tensor, *, out: Tensor) -> None:
        """Write one image per id, kept from several candidates if there is a selection."""
        if self.hooks.selection is None:
            sampler.sample(ids, labels, out=out)
        else:
            self.hooks.selection.write(sampler.sample, ids, labels, out=out)

    @property
    def _num_rejected(self) -> int:
        """Number of images of all ranks that were generated and not kept."""
        selection = self.hooks.selection
        return 0 if selection is None else self.labels.next_id * (selection.num_candidates - 1)

    def _check(self, num_broken: int) -> None:
        num_made = sum(sampler.num_made for _, sampler in self.samplers)
        is_guided = self.hooks.guide is not None
        check_broken(num_broken, num_made * self._ranks.world_size, is_guided=is_guided)

    def _num_broken(self, device: torch.device) -> Tensor:
        none = torch.zeros((), dtype=torch.int64, device=device)
        return sum((sampler.num_broken for _, sampler in self.samplers), none)
