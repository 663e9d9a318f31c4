"""The ring's images on disk: one immutable file per block, written once.

Images are most of a run's state and do not change
once committed. So each block is written when it is committed, by the writer's thread, and a
checkpoint holds the ring's counters and the SHA-256 of each block's file. Block k of a run is
always `block-K.safetensors`: a resumed run makes the same images again under the same name. Files
stay while the ring holds their images or a checkpoint names them.
N capacity, c channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load
from torch import Tensor

from dmkd_fast.runtime import files, model_files


class Ring(Protocol):
    """What is needed of a `RingBuffer`."""

    images: Tensor
    ids: Tensor
    labels: Tensor
    capacity: int
    block_images: int

    @property
    def guard_blocks(self) -> int:
        """Blocks ahead of the writing that are not drawn."""
        ...

    @property
    def num_inserted(self) -> int:
        """Images committed so far."""
        ...

    def state_dict(self, *, images: bool = True) -> dict[str, Any]:
        """Everything, `is_torn` among it; without pixels if not `images`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class BlockFiles:
    """A ring to be saved: its state with images replaced by references to files.

    Args:
        ring: (N, c, H, W) uint8 images in blocks.
        folder: Of the files.
        writer: Writes them, in the order of the blocks.
        remakes: `remake(ids, labels, out=images)` makes the images of a damaged file again; what
            the first of them makes that is the same to the bit is used.
    """

    def __init__(
        self, ring: Ring, folder: Path, writer: files.Writer, *,
        remakes: Sequence[Callable[..., object]],
    ) -> None:  # fmt: skip
        self.ring, self.folder, self.writer, self.remakes = ring, folder, writer, remakes
        self.notes: list[str] = []
        """One line for each file that was damaged and made again by `load_state_dict`."""
        self._queued: set[int] = set()
        # Changed by the writer's thread, but in `load_state_dict`.
        self._digests: dict[int, str] = {}
        self._errors: dict[int, OSError] = {}
        self._named: set[int] = set()

    def append(self) -> None:
        """Have the committed blocks written that have no file yet; waits if the disk is behind."""
        self._queue(self._held())

    def drop_unused(self, states: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Delete files that neither the ring nor a checkpoint needs.

        Args:
            states: Gives what the kept checkpoints hold of this object; called by the writer when
                all that is queued now is written.
        """
        self.writer.submit(functools.partial(self._drop_unused, self._held().start, states))

    def state_dict(self) -> dict[str, Any]:
        """The ring's state, and which blocks it holds."""
        state = self.ring.state_dict(images=False)
        held = self._held()
        # An open or aborted block lies half written over the oldest one, which is not drawn again.
        is_full = len(held) * self.ring.block_images == self.ring.capacity
        hidden = max(self.ring.guard_blocks, state["is_torn"]) if is_full else 0
        held = held[hidden:]
        for number in list(self._errors):
            del self._errors[number]
            self._queued.discard(number)
        self._queue(held)
        return {
            "ring": state,
            "shape": [self.ring.block_images, *self.ring.images.shape],
            "first": held.start,
            "last": held.stop,
            "digests": functools.partial(self._digests_of, held),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; images come from the files.

        Raises:
            ValueError: The state belongs to a ring of another shape.
            Damaged: A file is, and its images cannot be made again.
        """
        expected = [self.ring.block_images, *self.ring.images.shape]
        if state["shape"] != expected:
            raise ValueError(f"got blocks and ring of shape {state['shape']}, expected {expected}")
        self.ring.load_state_dict(state["ring"])
        self.notes, self._errors, self._digests = [], {}, {}
        self._named = set(range(state["first"], state["last"]))
        for number, digest in zip(sorted(self._named), state["digests"], strict=True):
            path, slots = self.folder / _name(number), self._slots(number)
            try:
                data = files.read(path)
                if files.sha256([data]) != digest:
                    raise files.Damaged(f"{path.name} has the wrong SHA-256")
                self.ring.images[slots].copy_(load(data)["images"])
                self._digests[number] = digest
            except files.Damaged as error:
                if not self._remade(slots, digest):
                    raise files.Damaged(
                        f"{error}; its images could not be made again to the bit"
                    ) from None
                self.notes.append(f"{path}: damaged ({error}); its images were made again")
        self._queued = set(self._digests)  # Those made again get new files.

    def _remade(self, slots: slice, digest: str) -> bool:
        """Make the images of some slots again; whether they are those of the file."""
        images = self.ring.images[slots]
        for remake in self.remakes:
            # A source on disk may be damaged itself.
            with contextlib.suppress(ValueError, OSError):
                remake(self.ring.ids[slots], self.ring.labels[slots], out=images)
                if files.sha256(model_files.file_parts({"images": images.cpu()})) == digest:
                    return True
        return False

    def _held(self) -> range:
        """Numbers of the blocks in the ring."""
        last = self.ring.num_inserted // self.ring.block_images
        return range(max(0, last - self.ring.capacity // self.ring.block_images), last)

    def _slots(self, number: int) -> slice:
        start = number * self.ring.block_images % self.ring.capacity
        return slice(start, start + self.ring.block_images)

    def _queue(self, numbers: range) -> None:
        for number in numbers:
            if number in self._queued:
                continue
            images = self.ring.images[self._slots(number)]
            copy = torch.empty(images.shape, dtype=torch.uint8, pin_memory=images.is_cuda)
            copy.copy_(images, non_blocking=True)
            copied = torch.cuda.Event() if images.is_cuda else None
            if copied is not None:
                copied.record()
            first = self._held().start
            self.writer.submit(functools.partial(self._write, number, copy, copied, first))
            self._queued.add(number)  # Last: an interrupt before this has it written once more.

    def _write(
        self, number: int, images: Tensor, copied: torch.cuda.Event | None, first: int
    ) -> None:
        if copied is not None:
            copied.synchronize()
        try:
            files.make_folder(self.folder)
            parts = model_files.file_parts({"images": images})
            self._digests[number] = files.replace(self.folder / _name(number), parts)
        except OSError as error:  # Told by the checkpoint that needs the file.
            self._errors[number] = error
        self._drop(first)

    def _drop(self, first: int) -> None:
        """Delete what has left the ring, whose oldest block is now `first`."""
        for number in [k for k in self._digests if k < first and k not in self._named]:
            files.discard(self.folder / _name(number))
            del self._digests[number]

    def _drop_unused(self, first: int, states: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self._named = {k for state in states() for k in range(state["first"], state["last"])}
        self._drop(first)
        for path in self.folder.glob("block-*"):
            found = re.fullmatch(r"block-(\d+)\.safetensors", path.name)
            if found and int(found[1]) not in self._named | self._digests.keys():
                files.discard(path)
        for partial in self.folder.glob(".block-*"):
            files.discard(partial)

    def _digests_of(self, numbers: range) -> list[str]:
        """SHA-256 of each file, once all of them are safely on disk."""
        for number in numbers:
            if number not in self._digests:
                raise self._errors[number]
        if numbers:
            files.sync(self.folder)
        return [self._digests[number] for number in numbers]


def _name(number: int) -> str:
    return f"block-{number:09d}.safetensors"
