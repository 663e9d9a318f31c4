"""Views of a batch of ring slots for the student and all teachers, and the teachers' logits.

All networks see the same crops.
Shapes: B views in a batch, C classes, S pixels on a side of a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmkd_fast.classifiers.ensemble import Teacher, Teachers
from dmkd_fast.classifiers.loading import for_inference
from dmkd_fast.runtime.errors import UserError
from dmkd_fast.views.crops import Views, ViewSpec
from dmkd_fast.views.mixing import Mixed, Mixer
from dmkd_fast.views.spec import InputSpec, check_logits


class Part(NamedTuple):
    """One micro-batch of views with its targets."""

    views: Tensor
    """Views (B, c, S, S) of the student."""
    teacher_logits: Tensor
    """Combined logits (B, C) of the teachers."""
    target: Tensor
    """Class ids (B,) that the images were made for, or their mixture as probabilities (B, C)."""


class Targets:
    """Render each crop for every active network, and compute the teachers' logits.

    Args:
        teacher: Classifier with the student's input, or `Teachers`.
        views: Source of the crops; its size and normalization are those of the student's views.
        mixer: Mixing of the views; None: no mixing.
        input: Input of the student; None: derived from `views`.
        dtype: Compute dtype of the teachers.
        compile: Whether to use torch.compile on the teachers.

    Raises:
        UserError: `input` does not match the views, or a mixer is combined with teachers that
            teach only some classes.
    """

    def __init__(
        self,
        teacher: nn.Module | Teachers,
        views: Views,
        mixer: Mixer | None = None,
        *,
        input: InputSpec | None,
        dtype: torch.dtype,
        compile: bool,
    ) -> None:
        spec = views.spec
        self.input = input or InputSpec(
            size=spec.size, mean=tuple(spec.mean.tolist()), std=tuple(spec.std.tolist())
        )
        if self.input.size != spec.size or len(self.input.mean) != len(spec.mean):
            raise UserError(
                f"student_input: got {self.input.num_channels} channels of {self.input.size} "
                f"pixels, expected the views' {len(spec.mean)} of {spec.size}; make both agree"
            )
        if not isinstance(teacher, Teachers):
            teacher = Teachers([Teacher(module=teacher, input=self.input)])
        if mixer is not None and any(member.teaches is not None for member in teacher.members):
            raise UserError(
                "mixer: got one with teachers that teach some classes only, expected none, as a "
                "mixed view is of two classes; leave one of the two out"
            )
        self._mixer = mixer

        def fast(module: nn.Module, input: InputSpec) -> nn.Module:
            copy = for_inference(module, dtype, input)
            return torch.compile(copy, dynamic=False) if compile else copy  # type: ignore[return-value]

        self._teachers, self._views, self._dtype = teacher.mapped(fast), views, dtype
        self._renderings = {
            wanted: ViewSpec(
                size=wanted.size,
                mean=wanted.mean,
                std=wanted.std,
                dtype=spec.dtype,
                device=spec.mean.device,
            )
            for wanted in teacher.inputs
        } | {self.input: spec}

    def views(
        self, slots: Tensor, indices: Tensor, ids: Tensor, uses: Tensor, *, share: float
    ) -> dict[InputSpec, Tensor]:
        """Render the same crops for the student and every teacher active at this progress.

        Args:
            slots: Images (N, c, H, W) uint8 of the ring.
            indices: Slots (B,) int64, as `RingBuffer.sample` returns them.
            ids: Image ids (B,) int64, as `RingBuffer.sample` returns them.
            uses: Use counts (B,) int64, as `RingBuffer.sample` returns them.
            share: Progress of the run in [0, 1].

        Returns:
            Views (B, c, S, S) for each input.
        """
        needed = {self.input, *self._teachers.inputs_at(share)}
        return self._render(slots, indices, ids, uses, needed)

    def mixed(
        self, views: dict[InputSpec, Tensor], *, step: int
    ) -> tuple[dict[InputSpec, Tensor], Mixed | None]:
        """Mix the views in the same way for all networks.

        Args:
            views: Views (B, c, S, S) for each input.
            step: Current step of the run; the mixing depends on it and on the mixer's seed.

        Returns:
            The mixed views, and the mixing of the student's views. Without a mixer: the views
            unchanged, and None.
        """
        if self._mixer is None:
            return views, None
        mixed = self._mixer.renderings(views, step=step)
        return {spec: each.views for spec, each in mixed.items()}, mixed[self.input]

    def parts(
        self,
        views: dict[InputSpec, Tensor],
        labels: Tensor,
        mixed: Mixed | None,
        *,
        share: float,
        size: int,
    ) -> Iterator[Part]:
        """Yield the batch in micro-batches of `size` views, each with its targets.

        The teachers run on a micro-batch only when the iterator reaches it.
        """
        for first in range(0, len(labels), size):
            rows = slice(first, first + size)
            seen = {spec: batch[rows] for spec, batch in views.items()}
            logits = self.logits(seen, labels[rows], share=share)
            target = labels if mixed is None else mixed.targets(labels, logits.shape[1])
            yield Part(seen[self.input], logits, target[rows])

    def logits(self, views: dict[InputSpec, Tensor], labels: Tensor, *, share: float) -> Tensor:
        """Return the teachers' logits (B, C) for images made for the classes `labels` (B,)."""
        wanted = self._teachers.inputs_at(share)
        return self._teachers({spec: views[spec].to(self._dtype) for spec in wanted}, labels, share)

    @torch.no_grad()
    def try_all(self, slots: Tensor, places: Tensor) -> Tensor:
        """Run all teachers of the run once, so that they compile; return the student's views."""
        views = self._render(slots, places, places, places, set(self._renderings))
        for network, member in zip(self._teachers.networks, self._teachers.members, strict=True):
            check_logits("teacher", network(views[member.input].to(self._dtype)), len(places))
        return views[self.input]

    def _render(
        self, slots: Tensor, indices: Tensor, ids: Tensor, uses: Tensor, needed: set[InputSpec]
    ) -> dict[InputSpec, Tensor]:
        boxes, flips = self._views.parameters(ids, uses, slots.shape[-2], slots.shape[-1])
        return {
            spec: self._views.render(slots, indices, boxes, flips, rendering)
            for spec, rendering in self._renderings.items()
            if spec in needed
        }
