"""The images of the ring on disk: one immutable file per block, written once.

Images are most of the state of a run, and they do not change once committed. So the writer's thread
writes each block after its commit, and a checkpoint holds only the counters of the ring and the
SHA-256 of each block file. Block K of a run is always `block-K.safetensors`: a resumed run makes
the same images again under the same name. A file stays while the ring holds its images or a
checkpoint names it.

Shapes: N slots, c channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from dmkd_fast.ring.buffer import RingBuffer
from dmkd_fast.runtime import files, model_files
from dmkd_fast.runtime.errors import UserError


class BlockFiles:
    """Save and restore a ring, with its images in block files and the rest in the checkpoint.

    Args:
        ring: Ring buffer whose images are written.
        folder: Folder of the block files.
        writer: Thread that writes the files, in the order of the blocks.
        remakes: Functions that make the images of a damaged file again, called as
            `remake(ids, labels, out=images)`, in this order, until one gives the same bits.
    """

    def __init__(
        self,
        ring: RingBuffer,
        folder: Path,
        writer: files.Writer,
        *,
        remakes: Sequence[Callable[..., object]],
    ) -> None:
        self.ring, self.folder, self.writer, self.remakes = ring, folder, writer, remakes
        self.notes: list[str] = []
        """One line for each damaged file whose images `load_state_dict` made again."""
        self._queued: set[int] = set()
        # The writer's thread changes these; so do `state_dict` and `load_state_dict`.
        self._digests: dict[int, str] = {}
        self._errors: dict[int, OSError] = {}
        self._named: set[int] = set()

    def append(self) -> None:
        """Queue each committed block that has no file yet; waits if the disk is behind."""
        self._queue(self.ring.blocks.held)

    def drop_unused(self, states: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Delete files that neither the ring nor a checkpoint needs.

        Args:
            states: Function that returns the state of this object in each kept checkpoint. The
                writer's thread calls it after all jobs queued so far.
        """
        self.writer.submit(
            functools.partial(self._drop_unused, self.ring.blocks.held.start, states)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the ring without pixels, and which blocks it holds."""
        state = self.ring.state_dict(images=False)
        blocks, held = self.ring.blocks, self.ring.blocks.held
        # Leave out the oldest blocks if they cannot be drawn; a new block may half cover them.
        if len(held) == blocks.num_blocks:
            held = held[max(blocks.guard_blocks, state["is_torn"]) :]
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
        """Load the result of `state_dict`, and the images from the block files.

        Raises:
            UserError: The state belongs to a ring of another shape.
            DamagedError: A file is damaged, and its images cannot be made again.
        """
        expected = [self.ring.block_images, *self.ring.images.shape]
        if state["shape"] != expected:
            raise UserError(f"got blocks and ring of shape {state['shape']}, expected {expected}")
        self.ring.load_state_dict(state["ring"])
        self.notes, self._errors, self._digests = [], {}, {}
        self._named = set(range(state["first"], state["last"]))
        for number, digest in zip(sorted(self._named), state["digests"], strict=True):
            path, slots = self.folder / _name(number), self.ring.blocks.slots(number)
            try:
                data = files.read(path)
                if files.sha256([data]) != digest:
                    raise files.DamagedError(f"{path.name} has the wrong SHA-256")
                self.ring.images[slots].copy_(load(data)["images"])
                self._digests[number] = digest
            except files.DamagedError as error:
                if not self._remade(slots, digest):
                    raise files.DamagedError(
                        f"{error}; its images could not be made again bit for bit"
                    ) from None
                self.notes.append(f"{path}: damaged ({error}); its images were made again")
        # Images that were made again get new files. Those that the state leaves out get none: their
        # slots hold nothing, and an older checkpoint may name their files.
        left_out = range(self.ring.blocks.held.start, state["first"])
        self._queued = {*self._digests, *left_out}

    def _remade(self, slots: slice, digest: str) -> bool:
        """Make the images of some slots again, and return whether they match the file's SHA-256."""
        images = self.ring.images[slots]
        for remake in self.remakes:
            # A source on disk may be damaged as well; then the next function is tried.
            with contextlib.suppress(ValueError, OSError):
                remake(self.ring.ids[slots], self.ring.labels[slots], out=images)
                if files.sha256(model_files.file_parts({"images": images.cpu()})) == digest:
                    return True
        return False

    def _queue(self, numbers: range) -> None:
        for number in numbers:
            if number in self._queued:
                continue
            images = self.ring.images[self.ring.blocks.slots(number)]
            copy = torch.empty(images.shape, dtype=torch.uint8, pin_memory=images.is_cuda)
            copy.copy_(images, non_blocking=True)
            copied = torch.cuda.Event() if images.is_cuda else None
            if copied is not None:
                copied.record(torch.cuda.current_stream(images.device))
            first = self.ring.blocks.held.start
            self.writer.submit(functools.partial(self._write, number, copy, copied, first))
            self._queued.add(number)  # last, so that an interrupt before it repeats the write

    def _write(
        self, number: int, images: Tensor, copied: torch.cuda.Event | None, first: int
    ) -> None:
        if copied is not None:
            copied.synchronize()
        try:
            files.make_folder(self.folder)
            parts = model_files.file_parts({"images": images})
            self._digests[number] = files.replace(self.folder / _name(number), parts)
        except OSError as error:  # raised later, by the checkpoint that needs the file
            self._errors[number] = error
        self._drop(first)

    def _drop(self, first: int) -> None:
        """Delete files of blocks older than `first`, unless a checkpoint names them."""
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
        """Return the SHA-256 of each file, once all of them are safely on disk."""
        for number in numbers:
            if number not in self._digests:
                raise self._errors[number]
        if numbers:
            files.sync(self.folder)
        return [self._digests[number] for number in numbers]


def _name(number: int) -> str:
    return f"block-{number:09d}.safetensors"
