"""Keep the ring filled from a stream of images, and draw batches of views from it.

    ImageStream -> RingBuffer -> Targets (views, mixing)

`Distiller` trains on these batches, and `GeneratedLoader` hands them to other loops.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dmkd_fast.ring.buffer import Block, RingBuffer
from dmkd_fast.runtime.device import InFlight
from dmkd_fast.runtime.errors import invalid
from dmkd_fast.training.images import ImageStream
from dmkd_fast.training.objective import TopLogits
from dmkd_fast.training.targets import Targets
from dmkd_fast.views.mixing import Mixed
from dmkd_fast.views.spec import InputSpec


class Written(NamedTuple):
    """A block of new images that is not committed yet."""

    block: Block
    ids: Tensor
    labels: Tensor


class Batch(NamedTuple):
    """Views of a drawn batch."""

    views: dict[InputSpec, Tensor]
    """Views (B, c, S, S) for each input."""
    labels: Tensor
    """Classes (B,) of the images."""
    mixed: Mixed | None
    """Mixing of the student's views; None without a mixer."""
    recalled: Tensor | TopLogits | None
    """Stored logits of the teacher; None if the teachers run."""


class Feed:
    """Insert images as the plan of the ring demands, and render views of what is drawn.

    Args:
        images: Source of the images.
        ring: Buffer that holds the newest images of this process on the device.
        targets: Views of the images, and their mixing.
        batch_size: Views of a step on this rank.

    Raises:
        UserError: The ring would stop the loop, or it has guard blocks and `images` may wait.
    """

    def __init__(
        self, images: ImageStream, ring: RingBuffer, targets: Targets, *, batch_size: int
    ) -> None:
        ring.plan.check_batch(batch_size)
        if ring.plan.guard_blocks and images.may_wait:
            kinds = "are stored or depend on the student or the progress of the run"
            got = f"{ring.plan.guard_blocks} with images that {kinds}"
            raise invalid("guard_blocks", got, "0, as their blocks are not made ahead")
        self.images, self.ring, self.targets, self.batch_size = images, ring, targets, batch_size
        self.in_flight = InFlight(ring.images.device)
        self._ahead: Written | None = None

    @property
    def must_insert(self) -> bool:
        """Whether a block must be committed before the next batch can be drawn."""
        return self.ring.must_insert(self.batch_size) and not self.images.is_exhausted

    def write(self, *, progress: float) -> Written:
        """Return the block to commit next, which may have been written ahead of need."""
        return self._ahead or self._write(progress)

    def commit(self, written: Written) -> None:
        """Make a written block visible to `draw`."""
        block, ids, labels = written
        device = self.ring.images.device
        # Ids and labels of stored images are on the host.
        self.ring.commit(block, ids=ids.to(device), labels=labels.to(device))
        self.images.advance(len(ids))
        self._ahead = None

    def wants_block_ahead(self, views_left: int) -> bool:
        """Return whether to write a block ahead: a guard exists and later views need it."""
        return (
            self.ring.plan.guard_blocks > 0
            and self.ring.must_insert(views_left)
            and self.ring.may_insert(self.batch_size)
        )

    def write_ahead(self, *, progress: float) -> None:
        """Write a block ahead of need, without waiting for a producer's stream."""
        self._ahead = self._write(progress)

    def drop_ahead(self) -> None:
        """Forget a block that was written ahead of need; the same images are written again."""
        self._ahead = None

    def read_logits(self) -> None:
        """Read the stored logits, if any, of the images that a restored ring holds."""
        held = slice(0, self.ring.num_filled)
        self.targets.insert(held, self.ring.ids[held])

    def draw(self, *, step: int, progress: float, teachers: bool = True) -> Batch:
        """Draw a batch and render it for the student and every active teacher.

        Args:
            step: Current step of the run, on which the mixing depends.
            progress: Progress of the run in [0, 1].
            teachers: Whether to render for the teachers at all.
        """
        draw = self.ring.sample(self.batch_size)
        views = self.targets.render(
            self.ring.images,
            draw.indices,
            draw.ids,
            draw.uses,
            progress=progress if teachers else None,
        )
        recalled = self.targets.recalled(draw.indices, draw.ids, draw.uses)
        labels = self.ring.labels[draw.indices]  # (B,)
        self.ring.release()
        views, mixed = self.targets.mix(views, step=step)
        return Batch(views, labels, mixed, recalled)

    def skip(self) -> None:
        """Draw a batch without rendering it."""
        self.ring.sample(self.batch_size)
        self.ring.release()

    def _write(self, progress: float) -> Written:
        self.ring.abort()  # Drop a block that an interrupt left uncommitted.
        # `next_block` may wait until new images appear; hold no reserved block meanwhile.
        with self.ring.producing():
            ids, labels = self.images.next_block(self.ring.block_images)
        block = self.ring.reserve()
        try:
            with self.ring.producing(), self.in_flight.piece():
                self.images.write(ids, labels, block.images, progress=progress)
                self.targets.insert(slice(block.start, block.start + len(ids)), ids)
        except BaseException:
            self.ring.abort()
            raise
        return Written(block, ids, labels)
