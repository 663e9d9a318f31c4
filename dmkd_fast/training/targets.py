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
from dmkd_fast.classifiers.loading import for_inference, freeze
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.training.objective import TopLogits
from dmkd_fast.training.stored_teacher import StoredTeacher
from dmkd_fast.views.crops import Views, ViewSpec
from dmkd_fast.views.mixing import Mixed, Mixer
from dmkd_fast.views.spec import InputSpec, check_logits


class MicroBatch(NamedTuple):
    """Views with their targets."""

    views: Tensor
    """Views (B, c, S, S) of the student."""
    teacher_logits: Tensor | TopLogits
    """Combined logits (B, C) of the teachers, or the largest ones that were stored."""
    target: Tensor
    """Class ids (B,) of the images, or their mixture as probabilities (B, C)."""


class Targets:
    """Make what a training step learns from: views of drawn images, and the teachers' logits.

    Each crop is rendered for every active network, at its own size and normalization.

    Args:
        teachers: Classifier with the student's input, or `Teachers`, each of which sees the same
            crops at its own size and normalization; frozen here.
        views: Source of the crops; its size and normalization are those of the student's views.
        mixer: Mixing of the views, the same for the student and all teachers; None: no mixing.
        input: Resize and crop of test images for the student; None: derived from `views`.
        dtype: Compute dtype of the teachers.
        compile: Whether to use torch.compile on the teachers.
        stored: Stored logits, which are read instead of running the teachers; None: run them.

    Raises:
        UserError: `input` does not match the views, or a mixer is combined with stored logits or
            with teachers that teach only some classes.

    Attributes:
        networks: Fast copies of the teachers, which make the logits; with stored logits the
            teachers themselves, which do not run.
    """

    def __init__(
        self,
        teachers: nn.Module | Teachers,
        views: Views,
        *,
        mixer: Mixer | None = None,
        input: InputSpec | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        stored: StoredTeacher | None = None,
    ) -> None:
        spec = views.spec
        self.input = input or InputSpec(
            size=spec.size, mean=tuple(spec.mean.tolist()), std=tuple(spec.std.tolist())
        )
        if self.input.size != spec.size or len(self.input.mean) != len(spec.mean):
            got = f"{self.input.num_channels} channels of {self.input.size} pixels"
            expected = f"the views' {len(spec.mean)} of {spec.size}"
            raise invalid("input", got, expected, "make both agree")
        self.teachers, self.views = freeze(teachers), views
        ensemble = self.teachers
        if not isinstance(ensemble, Teachers):
            ensemble = Teachers([Teacher(module=ensemble, input=self.input)])
        if mixer is not None and any(member.teaches is not None for member in ensemble.members):
            got, fix = "one with teachers that teach some classes only", "leave one of the two out"
            raise invalid("mixer", got, "none, as a mixed view is of two classes", fix)
        if mixer is not None and stored is not None:
            got, fix = "one with stored logits", "leave one of the two out"
            raise invalid("mixer", got, "none, as stored logits are of whole views", fix)
        self.mixer, self.stored = mixer, stored

        def fast(module: nn.Module, input: InputSpec) -> nn.Module:
            copy = for_inference(module, dtype, input)
            return torch.compile(copy, dynamic=False) if compile else copy  # type: ignore[return-value]

        self.networks = ensemble.mapped(fast) if stored is None else ensemble
        self._dtype = dtype
        self._renderings = {
            wanted: ViewSpec(
                size=wanted.size,
                mean=wanted.mean,
                std=wanted.std,
                dtype=spec.dtype,
                device=spec.mean.device,
            )
            for wanted in ensemble.inputs
        } | {self.input: spec}

    def render(
        self, slots: Tensor, indices: Tensor, ids: Tensor, uses: Tensor, *, progress: float | None
    ) -> dict[InputSpec, Tensor]:
        """Render the same crops for the student and every teacher active at this progress.

        Args:
            slots: Images (N, c, H, W) uint8 of the ring.
            indices: Slots (B,) int64, as `RingBuffer.sample` returns them.
            ids: Image ids (B,) int64, as `RingBuffer.sample` returns them.
            uses: Use counts (B,) int64, as `RingBuffer.sample` returns them.
            progress: Progress of the run in [0, 1]; None renders for the student alone.

        Returns:
            Views (B, c, S, S) for each input.
        """
        needed = {self.input}
        if self.stored is not None:
            ids, uses = self.stored.replayed(ids, uses)
        elif progress is not None:
            needed.update(self.networks.inputs_at(progress))
        return self._render(slots, indices, ids, uses, needed)

    def insert(self, slots: slice, ids: Tensor) -> None:
        """Read the stored logits, if any, of images (n,) that enter the ring."""
        if self.stored is not None:
            self.stored.insert(slots, ids)

    def recalled(self, indices: Tensor, ids: Tensor, uses: Tensor) -> Tensor | TopLogits | None:
        """Return the stored logits of the views that `render` makes; None if the teachers run."""
        if self.stored is None:
            return None
        return self.stored.logits(indices, self.stored.replayed(ids, uses)[1])

    def mix(
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
        if self.mixer is None:
            return views, None
        mixed = self.mixer.renderings(views, step=step)
        return {spec: each.views for spec, each in mixed.items()}, mixed[self.input]

    def micro_batches(
        self,
        views: dict[InputSpec, Tensor],
        labels: Tensor,
        mixed: Mixed | None,
        recalled: Tensor | TopLogits | None,
        *,
        progress: float,
        size: int,
    ) -> Iterator[MicroBatch]:
        """Yield the batch in micro-batches of `size` views, each with its targets.

        The teachers, unless their logits are recalled, run on a micro-batch only when the iterator
        reaches it.
        """
        for first in range(0, len(labels), size):
            rows = slice(first, first + size)
            seen = {spec: batch[rows] for spec, batch in views.items()}
            logits: Tensor | TopLogits
            if isinstance(recalled, TopLogits):
                logits = TopLogits(*(values[rows] for values in recalled))
            elif recalled is not None:
                logits = recalled[rows]
            else:
                logits = self.logits(seen, labels[rows], progress=progress)
            target = labels
            if mixed is not None:
                assert isinstance(logits, Tensor)
                target = mixed.targets(labels, logits.shape[1])
            yield MicroBatch(seen[self.input], logits, target[rows])

    def logits(self, views: dict[InputSpec, Tensor], labels: Tensor, *, progress: float) -> Tensor:
        """Return the teachers' logits (B, C) for images of the classes `labels` (B,)."""
        wanted = self.networks.inputs_at(progress)
        inputs = {spec: views[spec].to(self._dtype) for spec in wanted}
        logits: Tensor = self.networks(inputs, labels, progress)
        return logits

    @torch.no_grad()
    def warm_up(self, slots: Tensor, indices: Tensor) -> Tensor:
        """Run all teachers of the run once, so that they compile.

        Args:
            slots: Images (N, c, H, W) uint8.
            indices: Slots (B,) int64.

        Returns:
            Views (B, c, S, S) of the student.

        Raises:
            UserError: A teacher does not return logits (B, C).
        """
        if self.stored is not None:
            return self._render(slots, indices, indices, indices, {self.input})[self.input]
        views = self._render(slots, indices, indices, indices, set(self._renderings))
        for network, member in zip(self.networks.networks, self.networks.members, strict=True):
            check_logits("teacher", network(views[member.input].to(self._dtype)), len(indices))
        return views[self.input]

    def _render(
        self, slots: Tensor, indices: Tensor, ids: Tensor, uses: Tensor, needed: set[InputSpec]
    ) -> dict[InputSpec, Tensor]:
        boxes, flips = self.views.parameters(ids, uses, slots.shape[-2], slots.shape[-1])
        return {
            spec: self.views.render(slots, indices, boxes, flips, rendering)
            for spec, rendering in self._renderings.items()
            if spec in needed
        }
